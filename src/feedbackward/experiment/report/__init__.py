"""Tables, curves and pages of what the runs gave."""
