"""The vision-language model: vision tower, projector and language model, with its training loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_sft.data.batch import Batch
from vlm_sft.data.image_layout import ImageLayout, LayoutRule
from vlm_sft.errors import UserError
from vlm_sft.model.connectors.base import Connector
from vlm_sft.model.image_tokens import image_tokens
from vlm_sft.model.language_model import causal_lm, decoder_of, head_logits
from vlm_sft.model.loss import chunked_cross_entropy
from vlm_sft.model.neftune import add_noise, text_lengths
from vlm_sft.model.packed_attention import Backend, PackedLayout
from vlm_sft.model.positions import position_limit
from vlm_sft.model.router import router_loss, router_loss_coefficient
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

IMAGE_NEWLINE: Final = "image_newline"
"""Name of the newline in the model, in checkpoints and in transformers."""


@dataclass(frozen=True)
class VlmOutput:
    """Loss of one batch.

    Attributes:
        loss_sum: Cross-entropy summed over all targets (scalar, with gradient), in float32 or in
            the dtype of the model if that is wider. For a mixture of experts whose own loss has
            one, plus the router loss times `num_targets`, so that the mean per token is the loss
            of the model itself.
        num_targets: Number of targets (int64 scalar).
        per_record_loss: `[records]`, summed cross-entropy of each record, without gradient and
            without the router loss.
    """

    loss_sum: Tensor
    num_targets: Tensor
    per_record_loss: Tensor


class VisionLanguageModel(nn.Module):
    """LLaVA's composition (arXiv 2304.08485, section 4.1): vision tower, projector, language model.

    The training forward pass of a `Batch` has four steps, each a method:

    1. `encode_images`: crops of images `[N, 3, H, W]` through tower and connector to embeddings
       `[N, tokens of a crop, D]`; `arrange` joins those of each image to its tokens.
    2. `embed`: text embeddings `[B, T, D]`, with the image embeddings at their placeholders.
    3. `decode`: embeddings through the language model's layers to hidden states `[B, T, D]`.
    4. `loss`: hidden states at the target positions through the head to the summed cross-entropy.

    The submodules have the names of `LlavaForConditionalGeneration`.

    Args:
        vision_tower: Frozen; images to features `[N, tower tokens, width]`.
        multi_modal_projector: The connector: features to embeddings of the language model.
        language_model: A causal language model of transformers, possibly wrapped by peft.
        layout_rule: Gives crops and tokens of every image; None: an image is one crop.
        image_newline: `[D]`, the token after each row of an image, for a rule that has newlines.

    Attributes:
        neftune_alpha: Strength of the noise on text embeddings in training mode; None for none.
        attention_backend: The attention kernel of packed batches.
    """

    def __init__(
        self,
        vision_tower: VisionTower,
        multi_modal_projector: Connector,
        language_model: PreTrainedModel | nn.Module,
        layout_rule: LayoutRule | None = None,
        image_newline: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.multi_modal_projector = multi_modal_projector
        self.language_model = language_model
        self.layout_rule = layout_rule or LayoutRule(multi_modal_projector.num_tokens)
        assert (image_newline is not None) == self.layout_rule.has_newline
        self.image_newline = image_newline
        self.neftune_alpha: float | None = None
        self.attention_backend: Backend = "sdpa"

    def forward(self, batch: Batch) -> VlmOutput:
        """Return the loss of a batch, padded or packed.

        Args:
            batch: On the device of the model. A packed one needs `install_packed_attention`.

        Raises:
            UserError: If image placeholders and images do not match; it names both counts.
        """
        self.require_matching_images(batch.input_ids, batch.num_crops, batch.layouts)
        image_embeds = None
        if batch.image_features is not None:
            image_embeds = self.arrange(self.project(batch.image_features), batch.layouts)
        elif batch.pixel_values is not None and batch.num_crops:
            image_embeds = self.arrange(self.encode_images(batch.pixel_values), batch.layouts)
        embeds = self.embed(batch.input_ids, image_embeds)
        layout = None
        if batch.segments is not None:
            layout = PackedLayout(
                batch.segments,
                embeds.device,
                self.attention_backend,
                batch.unique_target_positions,
            )
        if self.training and self.neftune_alpha is not None:
            is_text = batch.input_ids != IMAGE_TOKEN_ID
            # The padding of a packed row is a segment of its own and gets noise that nobody reads.
            if layout is None and batch.attention_mask is not None:
                is_text = is_text & batch.attention_mask
            embeds = add_noise(embeds, text_lengths(is_text, layout), self.neftune_alpha)
        if image_embeds is None:
            embeds = embeds + self._dummy_image(embeds)
        hidden, router = self.decode(embeds, batch.attention_mask, layout, with_router_loss=True)
        return self.loss(hidden, batch, router)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return embeddings `[N, tokens of a crop, D]` of crops `[N, 3, H, W]`, uint8."""
        return self.project(self.vision_tower(pixel_values))

    def project(self, features: Tensor) -> Tensor:
        """Return embeddings `[N, tokens of a crop, D]` of features `[N, tower tokens, width]`."""
        dtype = next(self.multi_modal_projector.parameters()).dtype
        return cast(Tensor, self.multi_modal_projector(features.to(dtype)))

    def arrange(self, crops: Tensor, layouts: Sequence[ImageLayout] | None) -> Tensor:
        """Return the tokens of images in their order, from the embeddings of their crops.

        Args:
            crops: `[N, tokens of a crop, D]`.
            layouts: The layout of each image; None: every image is one crop.

        Returns:
            `[tokens, D]`; with one crop per image `crops` itself.
        """
        if layouts is None or not self.layout_rule.needs_sizes:
            return crops
        return image_tokens(crops, layouts, self.image_newline)

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None) -> Tensor:
        """Return embeddings `[B, T, D]` of the language model, image embeddings in their places.

        Args:
            input_ids: `[B, T]`; `IMAGE_TOKEN_ID` once for each token of each image.
            image_embeds: `[..., D]` in the order of their placeholders, exactly as many as there
                are placeholders; None if there are none.
        """
        is_image = input_ids == IMAGE_TOKEN_ID
        table = causal_lm(self.language_model).get_input_embeddings()
        embeds = cast(Tensor, table(input_ids.masked_fill(is_image, 0)))
        if image_embeds is None:
            return embeds
        assert image_embeds.shape[-1] == embeds.shape[-1], "these are not image embeddings"
        return embeds.masked_scatter(is_image.unsqueeze(-1), image_embeds.to(embeds.dtype))

    def decode(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        layout: PackedLayout | None = None,
        *,
        with_router_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layers of the language model.

        Args:
            embeds: `[B, T, D]`.
            attention_mask: `[B, T]` bool, false on padding; None: there is no padding.
            layout: Segments of a packed row, which then decide what attends to what.
            with_router_loss: Compute the router loss, if the model's own loss has one.

        Returns:
            Last hidden states `[B, T, D]`, and the router loss (scalar) or None.
        """
        model = causal_lm(self.language_model)
        options: dict[str, Any] = {"attention_mask": attention_mask}
        if layout is not None:
            options = {
                # transformers takes a 4-d mask as it is. Given none, it would build a causal one
                # over the whole row; `packed_attention` ignores it and uses the layout.
                "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device),
                "position_ids": layout.position_ids,
                "packed_layout": layout,
            }
        routed = with_router_loss and router_loss_coefficient(model) is not None
        if routed:
            options["output_router_logits"] = True
        output = decoder_of(self.language_model)(inputs_embeds=embeds, use_cache=False, **options)
        router = router_loss(model, output.router_logits, attention_mask) if routed else None
        return cast(Tensor, output.last_hidden_state), router

    def loss(self, hidden: Tensor, batch: Batch, router: Tensor | None = None) -> VlmOutput:
        """Return the loss of hidden states `[B, T, D]`; only target positions reach the head.

        Args:
            hidden: What `decode` returned for the batch.
            batch: Lists the targets.
            router: The router loss, a scalar; None if there is none.
        """
        states = hidden.flatten(0, 1)[batch.target_positions]
        head = cast(nn.Module, causal_lm(self.language_model).get_output_embeddings())
        loss_sum, losses = chunked_cross_entropy(
            self.loss_logits, states, batch.target_ids, list(head.parameters())
        )
        per_record = losses.new_zeros(len(batch.record_ids)).index_add(
            0, batch.target_records, losses
        )
        if router is not None:
            loss_sum = loss_sum + router.to(loss_sum.dtype) * len(losses)
        count = torch.tensor(len(losses), dtype=torch.int64, device=hidden.device)
        return VlmOutput(loss_sum, count, per_record)

    def loss_logits(self, states: Tensor) -> Tensor:
        """Return logits `[n, V]` of hidden states `[n, D]` in the loss dtype: float32 or wider."""
        logits = head_logits(self.language_model, states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def logits(
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        layouts: Sequence[ImageLayout] | None = None,
        attention_mask: Tensor | None = None,
        layout: PackedLayout | None = None,
    ) -> Tensor:
        """Return the logits `[B, T, V]` of every position, without embedding noise.

        Args:
            input_ids: `[B, T]`; `IMAGE_TOKEN_ID` once for each token of each image.
            pixel_values: Crops of all images, `[N, 3, H, W]` uint8; None or N = 0 for text.
            layouts: The layout of each image; None: every image is one crop.
            attention_mask: `[B, T]` bool, false on padding; None: there is no padding.
            layout: Segments of a packed row.

        Raises:
            UserError: If image placeholders and images do not match.
        """
        embeds = self._embed_pixels(input_ids, pixel_values, layouts)
        hidden, _ = self.decode(embeds, attention_mask, layout)
        return head_logits(self.language_model, hidden)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        layouts: Sequence[ImageLayout] | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Return the ids of the answers only, `[B, new tokens]`.

        Args:
            input_ids: `[B, T]` prompts, padded on the left; `IMAGE_TOKEN_ID` once for each token
                of each image.
            attention_mask: `[B, T]`, false (0) on padding.
            pixel_values: `[N, 3, H, W]` uint8, the crops of all images in order; None or N = 0 for
                text.
            layouts: The layout of each image; None: every image is one crop.
            generation_kwargs: Passed to the `generate` of transformers.

        Raises:
            UserError: See `generate_from_embeds`; or image placeholders and images do not match.
        """
        embeds = self._embed_pixels(input_ids, pixel_values, layouts)
        return self.generate_from_embeds(embeds, attention_mask, **generation_kwargs)

    @torch.no_grad()
    def generate_from_embeds(
        self, embeds: Tensor, attention_mask: Tensor, **generation_kwargs: Any
    ) -> Tensor:
        """Return the ids of the answers to embedded prompts `[B, T, D]`; see `generate`.

        Raises:
            UserError: If prompts are padded on the right, or are longer than the model's positions.
        """
        if attention_mask.shape[0] > 1 and not bool(attention_mask[:, -1].all()):
            raise UserError(
                "generate: a batch of prompts must be padded on the left, not the right"
            )
        limit = position_limit(causal_lm(self.language_model))
        if limit is not None and limit.is_hard and "max_new_tokens" in generation_kwargs:
            room = limit.tokens - embeds.shape[1]
            if room < 1:
                raise UserError(
                    f"the prompt has {embeds.shape[1]:,} tokens, but the model has only "
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

    def _embed_pixels(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        layouts: Sequence[ImageLayout] | None,
    ) -> Tensor:
        if pixel_values is None or len(pixel_values) == 0:
            self.require_matching_images(input_ids, 0)
            return self.embed(input_ids, None)
        self.require_matching_images(input_ids, len(pixel_values), layouts)
        return self.embed(input_ids, self.arrange(self.encode_images(pixel_values), layouts))

    def _dummy_image(self, embeds: Tensor) -> Tensor:
        """Return exactly zero, computed from a constant image by tower and projector.

        So every rank builds the same autograd graph. Without it, a rank whose batch has no image
        hangs or fails in the collectives of FSDP, and in stage 1 a text-only batch would have no
        gradient at all.
        """
        size = self.vision_tower.image_spec.size
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=embeds.device)
        total = self.encode_images(blank).sum()
        if self.image_newline is not None:
            total = total + self.image_newline.sum()
        return (total * 0.0).to(embeds.dtype)

    def projector_state(self) -> dict[str, Tensor]:
        """Return the weights of `projector.safetensors` by their names in transformers."""
        state = self.multi_modal_projector.state_dict()
        return state if self.image_newline is None else {**state, IMAGE_NEWLINE: self.image_newline}

    def require_matching_images(
        self, input_ids: Tensor, num_crops: int, layouts: Sequence[ImageLayout] | None = None
    ) -> None:
        """Check that every image has its placeholders in one row of `input_ids` `[B, T]`.

        Args:
            input_ids: `IMAGE_TOKEN_ID` once for each token of each image.
            num_crops: Crops of all images.
            layouts: The layout of each image; None: every image is one crop.

        Raises:
            UserError: If the counts do not match; it names both.
        """
        rows = (input_ids == IMAGE_TOKEN_ID).sum(dim=1).tolist()
        per_image = [self.multi_modal_projector.num_tokens] * num_crops
        if layouts is not None:
            per_image = [layout.num_tokens for layout in layouts]
            expected = sum(layout.num_crops for layout in layouts)
            if num_crops != expected:
                raise UserError(
                    f"found {num_crops} crops for {len(layouts)} images, expected {expected}; give "
                    "all crops of an image",
                    code="image_count",
                )
        elif num_crops and self.layout_rule.needs_sizes:
            raise UserError(
                f"found {num_crops} crops without layouts, but this model divides images into "
                "crops; give the layout of each image",
                code="image_count",
            )
        if sum(rows) != sum(per_image):
            raise UserError(
                f"found {sum(rows)} image placeholders for {len(per_image)} images of "
                f"{_in_words(per_image)}, expected {sum(per_image)}; give one placeholder for each "
                "token of each image",
                code="image_count",
            )
        ends, position = {0, *accumulate(per_image)}, 0
        for row, count in enumerate(rows):
            position += count
            if position not in ends:
                raise UserError(
                    f"row {row} of the batch has {count} image placeholders and ends inside an "
                    f"image, of which each has {_in_words(per_image)}; keep the placeholders of an "
                    "image in one row",
                    code="image_count",
                )


def _in_words(tokens: Sequence[int]) -> str:
    """Return the tokens of each image in words."""
    low, high = min(tokens, default=0), max(tokens, default=0)
    return f"{low} tokens each" if low == high else f"{low} to {high} tokens each"
