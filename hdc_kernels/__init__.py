"""Fused contrastive losses for PyTorch: cosine, temperature, softmax and mean as one operation."""

from hdc_kernels import reference
from hdc_kernels.hd_nce import HDNCE, HDNCEMetrics, fused_hd_nce
from hdc_kernels.info_nce import InfoNCE, fused_info_nce

__all__ = [
    "HDNCE",
    "HDNCEMetrics",
    "InfoNCE",
    "fused_hd_nce",
    "fused_info_nce",
    "reference",
]
