"""Reports of a comparison: Markdown, JSON, one HTML page."""
