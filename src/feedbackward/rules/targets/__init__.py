"""Rules whose signals are differences to targets made by decoders."""
