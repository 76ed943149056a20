"""The one forward path of training, evaluation, scoring and verifying: from a pack of examples to sums."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from goldsmith.errors import ModelError
from goldsmith.models.attention import PACKED_ATTENTION
from goldsmith.models.attention_cuda import width_fits_varlen
from goldsmith.models.decoder_layers import install_decoder_layers
from goldsmith.models.layout import PackLayout, pack_layout
from goldsmith.models.lora import install_lora_layers
from goldsmith.models.precision import resolve_dtype
from goldsmith.objective.cross_entropy import ObjectiveSums, OutputHead
from goldsmith.objective.linear_cross_entropy import linear_cross_entropy
from goldsmith.objective.token_statistics import TokenStatistics, token_statistics
from goldsmith.types import PackedBatch

__all__ = ["LikelihoodModel"]

_HALF = (torch.bfloat16, torch.float16)


class LikelihoodModel(nn.Module):
    """A causal language model as a function from gold to its log-likelihood.

    Hidden states come from the decoder over the whole pack; the output projection is applied to gold positions only,
    a chunk of logits at a time.

    Args:
        causal_lm: a `transformers` causal LM of the attention kind; its attention is set to packed.
        chunk_size: gold tokens a chunk of logits; None chooses 64 MiB of them.
        label_smoothing: of the loss; the log-probabilities are never smoothed.
        compute_dtype: what matrix products are taken in (see `models.precision.resolve_dtype`); None: what `auto` gives on the
            model's device. A half precision is by autocast; weights stay as they are.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        *,
        chunk_size: int | None = None,
        label_smoothing: float = 0.0,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if causal_lm.get_output_embeddings() is None:
            raise ModelError(f"{type(causal_lm).__name__} has no output embedding: it is not a causal language model")
        self.causal_lm = causal_lm
        self.chunk_size = chunk_size
        self.label_smoothing = label_smoothing
        self._compute_dtype = compute_dtype
        self.use_packed_attention()
        install_lora_layers(causal_lm)
        # Layers computed by hand leave out, in the last of them, all positions but the gold.
        self.num_layers_by_hand = install_decoder_layers(causal_lm)

    def use_packed_attention(self) -> None:
        """Set the model's attention to packed, as it must be for `forward`."""
        self.causal_lm.set_attn_implementation(PACKED_ATTENTION)

    @property
    def device(self) -> torch.device:
        return next(self.causal_lm.parameters()).device

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The half precision that products are taken in by autocast; None where they are in the parameters' own type."""
        if self.causal_lm.dtype == torch.float64:
            return None
        dtype = self._compute_dtype or resolve_dtype("auto", self.device)
        return dtype if dtype in _HALF else None

    def head(self) -> OutputHead:
        """The output projection as the model's configuration has it; the proof compares it with the model's own logits."""
        embedding = self.causal_lm.get_output_embeddings()
        config = self.causal_lm.config.get_text_config()
        logit_scale = float(getattr(config, "logit_scale", None) or 1.0)
        logit_scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return OutputHead(
            weight_VD=embedding.weight,
            bias_V=getattr(embedding, "bias", None),
            logit_scale=logit_scale,
            soft_cap=getattr(config, "final_logit_softcapping", None),
        )

    def shares_contexts(self, longest: int) -> bool:
        """Whether packs of rows up to `longest` tokens may carry a shared context once (segments with a parent).

        The kernels that do it attend in full: neither a soft cap on the scores nor a window shorter than a row; on CUDA they
        work in half precision only.
        """
        config = self.causal_lm.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        is_windowed = any(isinstance(window, int) and window < longest for window in windows)
        has_soft_cap = getattr(config, "attn_logit_softcapping", None) is not None
        if is_windowed or has_soft_cap:
            return False
        if self.device.type == "cuda":
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            return width_fits_varlen(width) and (self.autocast_dtype or self.causal_lm.dtype) in _HALF
        return self.device.type == "cpu"

    def gold_states(self, batch: PackedBatch) -> torch.Tensor:
        """[K, D]: the decoder's last hidden states at the positions that predict gold."""
        rows_R = row_of_target_K = None
        if self.num_layers_by_hand:
            rows_R, row_of_target_K = torch.unique(batch.target_positions, return_inverse=True)
        layout = PackLayout.plan(
            batch.segment_lengths.tolist(),
            device=batch.input_ids.device,
            gold_rows_R=rows_R,
            segment_parents=batch.segment_parents.tolist(),
        )
        with pack_layout(layout):
            decoder = self.causal_lm.get_decoder()
            output = decoder(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state[0]
        if rows_R is None or row_of_target_K is None or hidden.shape[0] == batch.num_tokens:
            return hidden.index_select(0, batch.target_positions)
        # Rows are ascending; targets are not where contexts are shared, nor does each then have a row of its own.
        in_order = torch.equal(row_of_target_K, torch.arange(len(rows_R), device=rows_R.device))
        return hidden if in_order else hidden.index_select(0, row_of_target_K)

    def forward(self, batch: PackedBatch, coefficients_K: torch.Tensor | None = None) -> ObjectiveSums:
        """Sums over the gold of a pack.

        Args:
            batch: on the model's device.
            coefficients_K: the factor of each gold token's loss; `batch.target_weights` by default.
        """
        hidden_KD = self.gold_states(batch)
        weights_K = batch.target_weights if coefficients_K is None else coefficients_K
        return linear_cross_entropy(
            hidden_KD,
            self.head(),
            batch.target_ids,
            weights_K,
            label_smoothing=self.label_smoothing,
            chunk_size=self.chunk_size,
        )

    def statistics(self, batch: PackedBatch, *, top: int = 0, detailed: bool = False) -> TokenStatistics:
        """What scoring reads of the gold of a pack, by the same forward path; see `objective.token_statistics`.

        Args:
            batch: on the model's device.
            top: how many of the likeliest tokens are listed.
            detailed: ranks and entropies too.
        """
        with torch.no_grad():
            hidden_KD = self.gold_states(batch)
            return token_statistics(
                hidden_KD, self.head(), batch.target_ids, top=top, detailed=detailed, chunk_size=self.chunk_size
            )
