"""Rules whose sites have losses of their own."""
