"""Bridges to other libraries. Each is imported where it is used; if it is missing, the error names the extra."""
