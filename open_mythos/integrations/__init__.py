"""Bridges to what others have made. Each imports its library where it is used, and names the extra if it is missing."""
