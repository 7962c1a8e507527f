"""CLIP and T5 as text encoders: the text engines of FLUX.1 and Stable Diffusion 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel


class FluxText(nn.Module):
    """Both text encoders: CLIP ids [B, L], T5 ids [B, T] -> T5 states [B, T, E], CLIP pooled [B, P]."""

    def __init__(self, text_encoder: CLIPTextModel, text_encoder_2: T5EncoderModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.text_encoder_2(t5_ids)[0], self.text_encoder(clip_ids).pooler_output


class SD3Text(nn.Module):
    """The text encoders: ids of both CLIPs [B, L] and, where it is there, of T5 [B, T] -> states, pooled states.

    States [B, L + T, E]: those of both CLIPs side by side, widened with zeros, then T5's, zeros without it. Pooled
    states [B, P], CLIP's side by side.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        text_encoder_3: T5EncoderModel | None,
        *,
        tokens: int,
        width: int,
    ) -> None:
        """`tokens` T of T5, `width` E of the states that the transformer takes."""
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        if text_encoder_3 is not None:
            self.text_encoder_3 = text_encoder_3
        self.tokens, self.width = tokens, width

    def forward(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        encoders = (self.text_encoder, self.text_encoder_2)
        states, pooled = zip(*(clip_states(e, i) for e, i in zip(encoders, ids[:2], strict=True)), strict=True)
        clip = torch.cat(states, dim=-1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        if hasattr(self, "text_encoder_3"):
            t5 = self.text_encoder_3(ids[2])[0]
        else:
            t5 = clip.new_zeros(clip.shape[0], self.tokens, self.width)
        return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)


def clip_states(encoder: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A CLIP text encoder's states before its last layer [B, L, E], and its projected state of the prompt's end."""
    model = encoder.text_model
    x = model.embeddings(input_ids=ids)
    length = ids.shape[1]
    later = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
    states = x
    for layer in model.encoder.layers:
        states, x = x, layer(x, later[None, None])
    # Older configurations say 2 whatever the token is; the end is then the token with the highest number.
    marks = ids if model.eos_token_id == 2 else (ids == model.eos_token_id)
    end = x[torch.arange(len(x), device=x.device), marks.int().argmax(dim=-1)]
    return states, encoder.text_projection(model.final_layer_norm(end))
