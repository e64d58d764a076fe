"""Rules that send the error of one source straight to every site."""
