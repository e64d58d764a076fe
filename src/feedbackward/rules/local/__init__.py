"""Rules with a separate loss for each site."""
