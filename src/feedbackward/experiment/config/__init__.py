"""What a run or a comparison is asked to do: settings, files, command-line arguments."""
