"""Export a checkpoint, and print how the export was verified."""

import argparse
import sys

import torch

from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.errors import UserError
from vlm_sft.export.card import CardFields, require_results, write_card
from vlm_sft.export.consumers import Consumer, consumer_rows
from vlm_sft.export.folder import atomic_folder, write_facts
from vlm_sft.export.formats import ExportOptions, format_module
from vlm_sft.export.sample import first_image, image_sample
from vlm_sft.export.weights import require_shard_size
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.utils.console import echo
from vlm_sft.utils.ownership import require_new_directory


def run(args: argparse.Namespace) -> int:
    """Write and verify an export, and print the result; returns the exit code."""
    form = format_module(args.to)
    max_shard_size = require_shard_size(args.max_shard_size)
    if args.results is not None:
        require_results(args.results)
    if args.push_to_hub is not None:
        from vlm_sft.export.push import push, require_pushable

        require_pushable(args.push_to_hub)
    place = require_new_directory(args.out, inputs=[args.checkpoint])
    loaded = load_checkpoint(
        args.checkpoint, device="cpu", bases=parse_bases(args.base), template=args.template
    )
    if obstacles := form.obstacles(loaded):
        raise UserError(f"export --to {args.to}: {'; '.join(obstacles)}")
    options = _options(args, loaded, max_shard_size)
    with atomic_folder(place) as folder:
        result = form.export(loaded, folder, options)
        write_card(folder, loaded, args.checkpoint, result, _card_fields(args))
        write_facts(folder, result.facts)
    echo(f"{args.out}: {result.summary}", file=sys.stdout)
    print_consumers(result.consumers)
    if args.license is None:
        echo("note: the card states no license; give one with --license")
    if args.push_to_hub is not None:
        commit = push(args.out, args.push_to_hub, private=args.private, revision=args.revision)
        echo(f"pushed to {args.push_to_hub}: {commit}", file=sys.stdout)
    return 0


def _card_fields(args: argparse.Namespace) -> CardFields:
    name = args.push_to_hub or args.out.resolve().name  # a card is published: no local paths
    return CardFields(name, args.license, args.attribution, args.results)


def _options(args: argparse.Namespace, loaded: LoadedModel, max_shard_size: str) -> ExportOptions:
    image = args.image or first_image(loaded)
    return ExportOptions(
        sample=None if image is None else image_sample(loaded, image, args.prompt),
        image=image,
        prompt=args.prompt,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        max_shard_size=max_shard_size,
        merge=args.merge,
        without_adapters=args.without_adapters,
        tower_name=args.tower,
        outtype=args.outtype,
        unverified=args.unverified,
    )


def print_consumers(consumers: list[Consumer]) -> None:
    """Print which programs load the exported folder."""
    for name, loads, evidence, reason in consumer_rows(consumers):
        echo(f"  {name:<20} {loads:<9} {evidence:<14} {reason}", file=sys.stdout)
