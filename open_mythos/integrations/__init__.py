"""Bridges to what others have made. Each needs its extra, if any, only where it is used."""
