"""The encoder with its pools and projections: three views in, the pairs of HD-NCE out (the paper's Figure 3)."""

from collections.abc import Sequence

from torch import Tensor, nn

from hdc.backbones import Backbone

Pair = tuple[Tensor, Tensor]


def pool_space(feature_map: Tensor) -> Tensor:
    """2D global average pooling: [B, C, N, h, w] -> [B, N, C], one vector per timestep."""
    return feature_map.mean((3, 4)).mT


class HDC(nn.Module):
    """f, g_o^k, g_s^k and g_t^k.

    Args:
        backbone: the encoder f.
        spatial_scales, temporal_scales: the blocks whose features are contrasted spatially and
            temporally, out of 3, 4, 5.
        dim: output size of the projections.
    """

    def __init__(
        self,
        backbone: Backbone,
        spatial_scales: Sequence[int] = (3, 4, 5),
        temporal_scales: Sequence[int] = (3, 4, 5),
        dim: int = 128,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.spatial_scales = tuple(spatial_scales)
        self.temporal_scales = tuple(temporal_scales)

        def projections(scales: set[int]) -> nn.ModuleDict:
            layers = {str(k): nn.Linear(backbone.channels[k], dim) for k in sorted(scales)}
            return nn.ModuleDict(layers)

        for block in range(
            max([*spatial_scales, *temporal_scales]) + 1, 6
        ):  # no pair comes from there
            getattr(backbone, f"block{block}").requires_grad_(False)
        self.project_o = projections({*spatial_scales, *temporal_scales})
        self.project_s = projections(set(spatial_scales))
        self.project_t = projections(set(temporal_scales))
        # The three projections of a scale start out equal, so that a clip is like its own views from the
        # first step on. With three random starts the loss sits at ln B for the first 100 to 250 steps.
        for projection in (self.project_s, self.project_t):
            for k, layer in projection.items():
                layer.load_state_dict(self.project_o[k].state_dict())

    def forward(
        self, view_o: Tensor, view_s: Tensor | None, view_t: Tensor | None
    ) -> tuple[list[Pair], list[Pair]]:
        """The arguments `spatial` and `temporal` of `fused_hd_nce`.

        Args:
            view_o: [B, 3, T, H, W].
            view_s: another view of the same clips; may be None without spatial scales.
            view_t: a view of other clips of the same videos; may be None without temporal scales.

        Returns:
            One pair (v_o, v_s) of [B, N_k, dim] per spatial scale, and one pair (v_o, v_t) of [B, dim]
            per temporal scale.
        """
        pooled_o = self._pool(view_o)
        spatial, temporal = [], []
        if self.spatial_scales:
            assert view_s is not None
            pooled_s = self._pool(view_s)
            for k in self.spatial_scales:
                o, s = self.project_o[str(k)], self.project_s[str(k)]
                spatial.append((o(pooled_o[k]), s(pooled_s[k])))
        if self.temporal_scales:
            assert view_t is not None
            pooled_t = self._pool(view_t)
            for k in self.temporal_scales:
                o, t = self.project_o[str(k)], self.project_t[str(k)]
                # 3D pooling is the mean over time of the 2D pooling.
                temporal.append((o(pooled_o[k].mean(1)), t(pooled_t[k].mean(1))))
        return spatial, temporal

    def _pool(self, view: Tensor) -> dict[int, Tensor]:
        return {k: pool_space(feature_map) for k, feature_map in self.backbone(view).items()}
