"""Rules that send the output's error straight to every site."""
