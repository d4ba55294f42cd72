"""The vision-language model: tower, projector and language model, and the loss where it counts."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_sft.errors import UserError
from vlm_sft.model.loss import chunked_cross_entropy
from vlm_sft.model.neftune import add_noise, text_lengths
from vlm_sft.model.packed_attention import PackLayout
from vlm_sft.model.positions import position_limit
from vlm_sft.model.router import router_loss, router_loss_coefficient
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID


@dataclass(frozen=True)
class Supervision:
    """Which hidden states predict which tokens, in a batch whose rows are laid end to end.

    Attributes:
        sources: Places of the predicting states, `[num_targets]`.
        targets: Ids of the tokens predicted, `[num_targets]`.
        records: The record that each belongs to, `[num_targets]`.
        num_records: Records of the batch.
    """

    sources: Tensor
    targets: Tensor
    records: Tensor
    num_records: int

    @classmethod
    def of_labels(cls, labels: Tensor) -> "Supervision":
        """Of padded rows, each a record: labels `[B, T]` aligned with the ids, not shifted."""
        shifted = labels[:, 1:]
        rows, columns = (shifted != IGNORE_INDEX).nonzero(as_tuple=True)
        sources = rows * labels.shape[1] + columns
        return cls(sources, shifted[rows, columns], rows, len(labels))


@dataclass(frozen=True)
class VlmOutput:
    """What one forward pass gives.

    Attributes:
        loss_sum: Cross-entropy summed over all supervised tokens, with gradient; in float32, or in
            the model's own dtype where that is wider. In a mixture of experts whose own loss has
            one, plus the router loss times `num_targets`, so that a token's mean is the model's
            own loss.
        num_targets: Number of supervised tokens, int64 scalar.
        per_record_loss: Summed cross-entropy of each record `[B]`, without gradient and without
            the router loss.
        logits: `[B, T, V]`, only when no labels were given.
    """

    loss_sum: Tensor
    num_targets: Tensor
    per_record_loss: Tensor
    logits: Tensor | None = None


class VisionLanguageModel(nn.Module):
    """LLaVA's composition (arXiv 2304.08485, section 4.1): tower, projector, language model.

    The submodules carry the names of `LlavaForConditionalGeneration`. `neftune_alpha`: strength of
    the noise on text embeddings in training mode, None for none.
    """

    def __init__(
        self,
        vision_tower: VisionTower,
        multi_modal_projector: nn.Module,
        language_model: PreTrainedModel | nn.Module,
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.multi_modal_projector = multi_modal_projector
        self.language_model = language_model
        self.neftune_alpha: float | None = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        pack_layout: PackLayout | None = None,
        supervision: Supervision | None = None,
    ) -> VlmOutput:
        """Loss of padded or packed records, or their logits where nothing says what to predict.

        Args:
            input_ids: `[B, T]`; `IMAGE_TOKEN_ID` once for each feature of each image.
            attention_mask: `[B, T]`, false (0) on padding; None: there is none.
            labels: `[B, T]`, aligned with `input_ids` (not shifted); -100 carries no loss.
            pixel_values: `[N, 3, H, W]` uint8, in the placeholders' order; None or N = 0 for text.
            image_features: `[N, tokens, width]`, what the tower makes of the images, instead.
            pack_layout: The segments of one row `[1, T]` of packed records, in place of
                `attention_mask`; the model needs `install_packed_attention`.
            supervision: What to predict, in place of `labels`.

        Raises:
            UserError: If placeholders and images do not match, naming both counts.
        """
        images = None if image_features is None else self._projected(image_features)
        embeds = self.embed(input_ids, pixel_values, images)
        if self.training and self.neftune_alpha is not None:
            is_text = input_ids != IMAGE_TOKEN_ID
            if attention_mask is not None:
                is_text = is_text & attention_mask.bool()
            embeds = add_noise(embeds, text_lengths(is_text, pack_layout), self.neftune_alpha)
        if images is None and (pixel_values is None or pixel_values.shape[0] == 0):
            embeds = embeds + self._constant_image(embeds)
        if supervision is None and labels is not None:
            supervision = Supervision.of_labels(labels)
        hidden, of_router = self._hidden(
            embeds, attention_mask, pack_layout, with_router_loss=supervision is not None
        )
        if supervision is None:
            none = hidden.new_zeros((), dtype=_loss_dtype(hidden))
            count = torch.zeros((), dtype=torch.int64, device=hidden.device)
            return VlmOutput(none, count, none.expand(len(hidden)), self._logits(hidden))
        return self._loss(hidden, supervision, of_router)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """Embeddings `[B, T, D]` of the language model, image embeddings in their places.

        Args:
            input_ids: `[B, T]`; `IMAGE_TOKEN_ID` once for each feature of each image.
            pixel_values: `[N, 3, H, W]` uint8, in the placeholders' order; None or N = 0 for text.
            image_embeds: `[N, tokens, D]`, what `image_embeds_of` gave for the images, instead.

        Raises:
            UserError: If placeholders and images do not match, naming both counts.
        """
        is_image = input_ids == IMAGE_TOKEN_ID
        table = causal_lm(self.language_model).get_input_embeddings()
        embeds = cast(Tensor, table(input_ids.masked_fill(is_image, 0)))
        if image_embeds is None and pixel_values is not None and len(pixel_values):
            image_embeds = self.image_embeds_of(pixel_values)
        self._check_counts(is_image, 0 if image_embeds is None else len(image_embeds))
        if image_embeds is None:
            return embeds
        return embeds.masked_scatter(is_image.unsqueeze(-1), image_embeds.to(embeds.dtype))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Ids of the answers only, `[B, new tokens]`; prompts padded on the left.

        Images as for `embed`; `generation_kwargs` go to transformers' `generate`.
        """
        if attention_mask.shape[0] > 1 and not bool(attention_mask[:, -1].all()):
            raise UserError(
                "generate: a batch of prompts must be padded on the left, not the right"
            )
        embeds = self.embed(input_ids, pixel_values, image_embeds)
        limit = position_limit(causal_lm(self.language_model))
        if limit is not None and limit.is_hard and "max_new_tokens" in generation_kwargs:
            room = limit.tokens - input_ids.shape[1]
            if room < 1:
                raise UserError(
                    f"the prompt has {input_ids.shape[1]:,} tokens, but the model has only "
                    f"{limit.tokens:,} positions ({limit.key}); shorten it"
                )
            generation_kwargs["max_new_tokens"] = min(generation_kwargs["max_new_tokens"], room)
        generate = cast(Any, self.language_model).generate
        return cast(
            Tensor,
            generate(
                inputs_embeds=embeds, attention_mask=attention_mask.long(), **generation_kwargs
            ),
        )

    def image_embeds_of(self, pixel_values: Tensor) -> Tensor:
        """Tower and projector: `[N, 3, H, W]` uint8 to `[N, tokens, D]`."""
        return self._projected(self.vision_tower(pixel_values))

    def _projected(self, features: Tensor) -> Tensor:
        dtype = next(self.multi_modal_projector.parameters()).dtype
        return cast(Tensor, self.multi_modal_projector(features.to(dtype)))

    def _constant_image(self, embeds: Tensor) -> Tensor:
        """Exactly zero, through tower and projector: every process has the same graph.

        Without it a process whose batch has no image hangs or fails under FSDP and ZeRO, and in
        stage 1 a text-only batch would have no gradient path at all.
        """
        size = self.vision_tower.image_spec.size
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=embeds.device)
        images = self.image_embeds_of(blank)
        return (images.sum() * 0.0).to(embeds.dtype)

    def _check_counts(self, is_image: Tensor, num_images: int) -> None:
        tokens = self.vision_tower.num_tokens
        rows = is_image.sum(dim=1).tolist()
        if sum(rows) != num_images * tokens:
            raise UserError(
                f"found {sum(rows)} image placeholders for {num_images} images of {tokens} "
                f"tokens each, expected {num_images * tokens}; give one image for every "
                f"{tokens} placeholders",
                code="image_count",
            )
        for row, count in enumerate(rows):
            if count % tokens:
                raise UserError(
                    f"row {row} of the batch has {count} image placeholders, expected a multiple "
                    f"of {tokens}, the tokens of one image",
                    code="image_count",
                )

    def _hidden(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        pack_layout: PackLayout | None,
        *,
        with_router_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Last hidden states `[B, T, D]`, and the router loss where the model's own loss has it."""
        options: dict[str, Any] = {}
        real = attention_mask if pack_layout is None else pack_layout.real_tokens
        if pack_layout is not None:
            # A mask of four dimensions is taken as it is: transformers builds none of its own.
            attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
            options = {"position_ids": pack_layout.position_ids, "pack_layout": pack_layout}
        model = causal_lm(self.language_model)
        routed = with_router_loss and router_loss_coefficient(model) is not None
        if routed:
            options["output_router_logits"] = True
        decoder = decoder_of(self.language_model)
        output = decoder(
            inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False, **options
        )
        of_router = router_loss(model, output.router_logits, real) if routed else None
        return cast(Tensor, output.last_hidden_state), of_router

    def _loss(
        self, hidden: Tensor, supervision: Supervision, of_router: Tensor | None = None
    ) -> VlmOutput:
        states = hidden.flatten(0, 1)[supervision.sources]
        head = cast(nn.Module, causal_lm(self.language_model).get_output_embeddings())
        loss_sum, losses = chunked_cross_entropy(
            self._wide_logits, states, supervision.targets, list(head.parameters())
        )
        per_record = losses.new_zeros(supervision.num_records).index_add(
            0, supervision.records, losses
        )
        if of_router is not None:
            loss_sum = loss_sum + of_router.to(loss_sum.dtype) * len(losses)
        count = torch.tensor(len(losses), dtype=torch.int64, device=hidden.device)
        return VlmOutput(loss_sum, count, per_record)

    def _wide_logits(self, hidden: Tensor) -> Tensor:
        logits = self._logits(hidden)
        return logits.to(_loss_dtype(logits))

    def _logits(self, hidden: Tensor) -> Tensor:
        return head_logits(self.language_model, hidden)


def _loss_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def causal_lm(language_model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of peft's wrapper if it is in one."""
    get_base_model = getattr(language_model, "get_base_model", None)
    return cast(PreTrainedModel, get_base_model() if get_base_model else language_model)


def decoder_of(language_model: nn.Module) -> nn.Module:
    """The causal language model without its head."""
    model = causal_lm(language_model)
    return cast(nn.Module, model.get_decoder() or model.base_model)


def head_logits(language_model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits of hidden states `[..., D]`, scaled and capped as the model's own forward does.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 squashes with
    `final_logit_softcapping`.
    """
    model = causal_lm(language_model)
    config = model.config.get_text_config()
    logits = cast(Tensor, cast(nn.Module, model.get_output_embeddings())(hidden))
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def check_head(language_model: PreTrainedModel) -> None:
    """Prove on three tokens that loss and logits are computed here as the model itself does.

    Raises:
        UserError: The model does something to its inputs, logits or loss that is not known here,
            so that it would be trained on another loss than its own.
    """
    embeddings = cast(nn.Module, language_model.get_input_embeddings())
    device = next(embeddings.parameters()).device
    ids = torch.arange(3, device=device).unsqueeze(0)
    training, attention = language_model.training, language_model.config._attn_implementation
    language_model.eval()
    if device.type == "cpu" and "flash" in str(attention):  # which computes on GPUs alone
        language_model.set_attn_implementation("eager")
    expected = language_model(input_ids=ids, labels=ids, use_cache=False)
    routed = router_loss_coefficient(language_model) is not None
    options = {"output_router_logits": True} if routed else {}
    output = decoder_of(language_model)(inputs_embeds=embeddings(ids), use_cache=False, **options)
    logits = head_logits(language_model, output.last_hidden_state)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    if routed:
        loss = loss + router_loss(language_model, output.router_logits, None)
    language_model.train(training)
    if language_model.config._attn_implementation != attention:
        language_model.set_attn_implementation(attention)
    name = type(language_model).__name__
    if not torch.allclose(logits.float(), expected.logits.float(), rtol=1e-3, atol=1e-3):
        raise UserError(
            f"model.language_model: {name} computes its logits in a way that is not known here "
            f"(off by {(logits - expected.logits).abs().max().item():.2g}), so the loss would be "
            "wrong; use a model of another family"
        )
    if not torch.allclose(loss.float(), expected.loss.float(), rtol=1e-2, atol=1e-3):
        raise UserError(
            f"model.language_model: the own loss of {name} has a term that is not known here "
            f"({expected.loss.item():.4f} on three tokens, {loss.item():.4f} without it), which "
            "would be left out; use a model of another family, or set output_router_logits to "
            "false in its configuration if that is the term"
        )
