"""Hierarchically Decoupled Spatial-Temporal Contrast: self-supervised video representations."""
