"""Fused contrastive losses for PyTorch: cosine, temperature, softmax and mean as one operation."""

from hdc_kernels import reference
from hdc_kernels.augment import augment_clips
from hdc_kernels.clip import CLIP, fused_clip
from hdc_kernels.cross_entropy import InfoNCEMetrics
from hdc_kernels.decoupled import DCL, DCLW, fused_dcl, fused_dclw
from hdc_kernels.hard_negatives import HNNCE, fused_hn_nce
from hdc_kernels.hd_nce import HDNCE, HDNCEMetrics, fused_hd_nce
from hdc_kernels.in_chunks import InChunks
from hdc_kernels.info_nce import InfoNCE, fused_info_nce
from hdc_kernels.moco import MoCo, Queue, fused_moco
from hdc_kernels.nt_xent import NTXent, fused_nt_xent
from hdc_kernels.siglip import SigLIP, fused_siglip
from hdc_kernels.sup_con import SupCon, fused_sup_con

__all__ = [
    "CLIP",
    "DCL",
    "DCLW",
    "HDNCE",
    "HNNCE",
    "HDNCEMetrics",
    "InChunks",
    "InfoNCE",
    "InfoNCEMetrics",
    "MoCo",
    "NTXent",
    "Queue",
    "SigLIP",
    "SupCon",
    "augment_clips",
    "fused_clip",
    "fused_dcl",
    "fused_dclw",
    "fused_hd_nce",
    "fused_hn_nce",
    "fused_info_nce",
    "fused_moco",
    "fused_nt_xent",
    "fused_siglip",
    "fused_sup_con",
    "reference",
]
