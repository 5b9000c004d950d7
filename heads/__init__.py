"""Heads: decoders and whole dense-prediction networks, one published design per file."""
