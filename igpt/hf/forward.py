"""Image GPT's classes of transformers with forwards of our own: what patch.py puts in their place.

Each class stands in for its base: the same parameters, arguments and outputs. Attention is exact, its scale is
1/sqrt(head dim), a static cache's empty slots are never seen; means of squares, softmax and the loss are fp32 for half
precision; logits are never wider than the colours. What is not computed the same way is refused by name.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import QuickGELUActivation
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.models.imagegpt import modeling_imagegpt as hf
from transformers.pytorch_utils import Conv1D

from igpt import ops
from igpt.hf import arguments
from igpt.kernels.reference import wide

IGNORED = -100  # a label that doesn't count


class ImageGPTLayerNorm(hf.ImageGPTLayerNorm):
    def forward(self, tensor):
        return ops.norm(tensor, self.weight, eps=self.eps)


class ImageGPTAttention(hf.ImageGPTAttention):
    def forward(
        self, hidden_states, layer_past=None, attention_mask=None, encoder_hidden_states=None,
        encoder_attention_mask=None, use_cache=False, output_attentions=False, **kwargs,
    ):  # fmt: skip
        refuse_encoder(encoder_hidden_states, encoder_attention_mask)
        out, weights = attend(self, self.c_attn(hidden_states), layer_past, attention_mask, output_attentions)
        return self.resid_dropout(self.c_proj(out)), weights


class ImageGPTBlock(hf.ImageGPTBlock):
    def forward(
        self, hidden_states, layer_past=None, attention_mask=None, encoder_hidden_states=None,
        encoder_attention_mask=None, use_cache=False, output_attentions=False, **kwargs,
    ):  # fmt: skip
        refuse_encoder(encoder_hidden_states, encoder_attention_mask)
        h, a, m = hidden_states, self.attn, self.mlp
        if not is_fusible(self):
            out, weights = a(
                self.ln_1(h), layer_past=layer_past, attention_mask=attention_mask, use_cache=use_cache,
                output_attentions=output_attentions,
            )  # fmt: skip
            h = h + out
            return h + m(self.ln_2(h)), weights
        qkv, h = ops.norm_linear(
            h, self.ln_1.weight, a.c_attn.weight.t(), a.c_attn.bias, through=True, eps=self.ln_1.eps
        )
        out, weights = attend(a, qkv, layer_past, attention_mask, output_attentions)
        h = ops.norm_mlp(
            h, self.ln_2.weight, m.c_fc.weight.t(), m.c_proj.weight.t(), m.c_fc.bias, m.c_proj.bias,
            add=ops.linear(out, a.c_proj.weight.t(), a.c_proj.bias), eps=self.ln_2.eps,
        )  # fmt: skip
        return h, weights


class ImageGPTModel(hf.ImageGPTModel):
    def forward(
        self, input_ids=None, past_key_values=None, attention_mask=None, token_type_ids=None, position_ids=None,
        inputs_embeds=None, encoder_hidden_states=None, encoder_attention_mask=None, use_cache=None,
        output_attentions=None, output_hidden_states=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        refuse_encoder(encoder_hidden_states, encoder_attention_mask)
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        use_cache = config.use_cache if use_cache is None else use_cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: got both or neither, expected one of them")
        shape = arguments.positions(self, input_ids, inputs_embeds)
        N = shape[-1]
        if self.gradient_checkpointing and self.training:
            use_cache = False  # the blocks run twice
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        past = arguments.past(self, past_key_values, N)
        arguments.indices("position_ids", position_ids, self.wpe.num_embeddings, shape, may_repeat=True)
        arguments.indices("token_type_ids", token_type_ids, self.wte.num_embeddings, shape)
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids.view(-1, N))
        if position_ids is None:
            position_ids = (torch.arange(N, device=inputs_embeds.device) + past)[None]
        h = inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device)
        if token_type_ids is not None:
            h = h + self.wte(token_type_ids.view(-1, N))
        h = self.drop(h)
        mask = additive(attention_mask, h.dtype)
        if mask is not None:
            arguments.mask(attention_mask, h.shape[0], config.n_head, N, past, past_key_values)

        states, attentions = [], []
        for block in self.h:
            if output_hidden_states:
                states.append(h)
            h, weights = block(
                h, past_key_values, mask, None, use_cache=use_cache, output_attentions=output_attentions
            )[:2]
            attentions.append(weights)
        h = self.ln_f(h).view(*shape, h.shape[-1])
        outputs = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=h,
            past_key_values=past_key_values,
            hidden_states=(*states, h) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return outputs if return_dict else outputs.to_tuple()


class ImageGPTForCausalImageModeling(hf.ImageGPTForCausalImageModeling):
    igpt_paper_loss = False

    def forward(
        self, input_ids=None, past_key_values=None, attention_mask=None, token_type_ids=None, position_ids=None,
        inputs_embeds=None, encoder_hidden_states=None, encoder_attention_mask=None, labels=None, use_cache=None,
        output_attentions=None, output_hidden_states=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        return_dict = self.config.return_dict if return_dict is None else return_dict
        colours = self.config.vocab_size - 1
        arguments.labels(labels, input_ids, inputs_embeds, colours, IGNORED)
        paper_loss = labels is not None and self.igpt_paper_loss
        if paper_loss:
            if input_ids is None or past_key_values is not None:
                raise ValueError("labels: with paper_loss=True, expected input_ids and no past_key_values")
            input_ids = behind_start(input_ids, colours)
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        # A tied head has a row for the start vector, which is no colour.
        logits = self.lm_head(outputs.last_hidden_state)[..., :colours]
        loss = None
        if labels is not None:
            targets = labels if paper_loss else F.pad(labels[..., 1:], (0, 1), value=IGNORED)
            loss = F.cross_entropy(wide(logits).reshape(-1, colours), targets.reshape(-1), ignore_index=IGNORED)
        outputs = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return outputs if return_dict else outputs.to_tuple()


REPLACED = (ImageGPTLayerNorm, ImageGPTAttention, ImageGPTBlock, ImageGPTModel, ImageGPTForCausalImageModeling)
# A block that consists of these forwards computes what the fused operations do.
KNOWN = {
    *(cls.forward for cls in (ImageGPTLayerNorm, ImageGPTAttention)),
    *(cls.forward for cls in (hf.ImageGPTMLP, Conv1D, QuickGELUActivation, nn.Dropout)),
}


def is_fusible(block) -> bool:
    """Whether a block may run as fused operations: no dropout at work, no autocast (which chooses a dtype for each
    operation), and nothing that watches or replaces a module in between (hooks, adapters, offloading)."""
    dropout = block.training and block.mlp.dropout.p > 0
    if dropout or torch.is_autocast_enabled(block.ln_1.weight.device.type):
        return False
    a, m = block.attn, block.mlp
    modules = (block.ln_1, a, a.c_attn, a.c_proj, a.resid_dropout, block.ln_2, m, m.c_fc, m.act, m.c_proj, m.dropout)
    return not any(is_watched(module) for module in modules)


def is_watched(module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__ or type(module).forward not in KNOWN


def attend(attn, qkv, cache, mask, want_weights):
    """(attention's output (B, N, H D), its weights (B, H, N, M) or None) of the packed product qkv (B, N, 3 H D).

    mask: additive, broadcast to (B, H, N, M), on top of the causal one."""
    B, N, H, D = *qkv.shape[:2], attn.num_heads, attn.head_dim
    qkv = qkv.view(B, N, 3, H, D)
    scale = (D**-0.5 if attn.scale_attn_weights else 1.0) / (
        attn.layer_idx + 1 if attn.scale_attn_by_inverse_layer_idx else 1
    )
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, D]
    end = N
    if cache is not None:
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        k, v = cache.update(k, v, attn.layer_idx)
        end = cache.get_seq_length(attn.layer_idx)
    M = k.shape[2]
    dropout = attn.attn_dropout.p if attn.training else 0.0
    is_plain, weights = mask is None and M == N, None
    if is_plain and not dropout and not want_weights:
        return ops.attention(qkv, causal=True, scale=scale).reshape(B, N, H * D), None
    if want_weights:
        scores, bias = wide(q @ k.transpose(-1, -2)) * scale, seen(mask, end, N, M, q)
        scores = scores if bias is None else scores + bias
        weights = attn.attn_dropout(scores.softmax(-1).to(v.dtype))
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, None if is_plain else seen(mask, end, N, M, q), dropout, is_causal=is_plain, scale=scale
        )
    return out.transpose(1, 2).reshape(B, N, H * D), weights


def seen(mask, end, N, M, q):
    """What is added to the scores of the last N of `end` positions against a cache's M slots: 0 where a key may be
    seen, -inf behind the query and in slots not filled yet, and `mask`. None if there is nothing to add.

    `end` is a tensor in a static cache, so that a compiled step needs no new graph."""
    if mask is None and N == 1 and isinstance(end, int) and end == M:
        return None
    query = torch.arange(N, device=q.device) + (end - N)
    later = torch.arange(M, device=q.device) > query[:, None]  # [N, M]
    bias = torch.zeros((), dtype=q.dtype, device=q.device) if mask is None else to_slots(mask, M, q.dtype)
    return bias.masked_fill(later, float("-inf"))


def to_slots(mask, M, dtype):
    """The additive mask in a product's dtype, its columns extended to a cache's slots, which are not filled yet."""
    # Half of the smallest number: a score added to it stays finite, and a row that sees nothing stays free of NaN.
    mask = mask.clamp(min=torch.finfo(dtype).min / 2).to(dtype)
    return F.pad(mask, (0, M - mask.shape[-1]))


def additive(mask, dtype):
    """attention_mask as transformers takes it, 2-D (1 is kept) or 4-D (boolean or additive), as an additive one."""
    if mask is None:
        return None
    if not torch.is_tensor(mask) or mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask: got {arguments.said(mask)}, expected a tensor of 2 or 4 dimensions")
    if mask.dim() == 4 and mask.is_floating_point():
        return mask
    mask = mask.bool()
    if mask.dim() == 2:
        # Plain pictures come with a mask of ones; without it attention is one fused causal operation.
        if not torch.compiler.is_compiling() and mask.all():
            return None
        mask = mask[:, None, None, :]
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def behind_start(input_ids, start: int):
    """[start, x0 .. x(n-2)] from pixels x0 .. x(n-1), or from rows that are that already."""
    shifted = F.pad(input_ids[..., :-1], (1, 0), value=start)
    return torch.where(input_ids[..., :1] == start, input_ids, shifted)


def refuse_encoder(*encoder) -> None:
    if any(tensor is not None for tensor in encoder):
        raise ValueError(
            "encoder_hidden_states, encoder_attention_mask: cross-attention is not part of Image GPT; expected None "
            "in a model patched by apply_igpt_kernels (undo() brings the original back)"
        )
