"""Attention, transformer layers, packing of slides, positions."""
