"""Backbones: one paper per file. A file here is registered, in timm too, because it exists."""
