"""Load the parts of a finished vision-language model from the weight files of its folder.

A part is loaded completely or not at all: tensors that are missing, unexpected or of another shape
are an error with their names.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from vlm_sft.config.finished_files import WHERE, FinishedModel, small_files
from vlm_sft.config.finished_original import ORIGINAL_LANGUAGE_MODELS
from vlm_sft.errors import UserError
from vlm_sft.model.pretrained import load_pretrained
from vlm_sft.model.vlm import IMAGE_NEWLINE
from vlm_sft.model.weight_files import STORED_DTYPES, WeightFiles
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.reading import read_json

Part = Literal["vision_tower", "multi_modal_projector", "language_model"]

_LISTED: Final = 5
"""Names that an error lists of each kind."""

_ORIGINAL_KEYS: Final = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "freeze_",
    "image_",
    "mm_",
    "model_type",
    "tokenizer_",
    "transformers_version",
    "tune_",
    "unfreeze_",
    "use_mm_proj",
    "vision_tower",
)
"""Beginnings of keys of original configurations that are not those of the language model."""


class FinishedWeights:
    """The weights of a finished model, sorted by the part that they belong to.

    Args:
        found: The description of the model.

    Raises:
        UserError: A file is missing or cannot be read, or a tensor belongs to no part.
    """

    def __init__(self, found: FinishedModel) -> None:
        self.found = found
        self.folder = _with_weights(found)
        self._files = WeightFiles(_weight_paths(self.folder, found))
        self._names: dict[Part, dict[str, str]] = {
            "vision_tower": {},
            "multi_modal_projector": {},
            "language_model": {},
        }
        unexpected = []
        for name in self._files.names:
            place = _place(name, found)
            if place is None:
                unexpected.append(name)
            elif place[0] is not None:
                _add(self._names[place[0]], place[1], name, found)
        if found.weights != "full":
            unexpected += self._names["language_model"].values()
        _require_same(found.name, [], unexpected, [])

    def names(self, part: Part) -> list[str]:
        """Return the names of a part's tensors as they are in the part itself."""
        return list(self._names[part])

    def read(self, part: Part, *, body: str = "model") -> dict[str, Tensor]:
        """Return the tensors of a part under its own names.

        Args:
            part: The part.
            body: The name of the language model without its head, in its class.

        Raises:
            UserError: A tensor is there under two names, or cannot be read.
        """
        names: dict[str, str] = {}
        for own, name in self._names[part].items():
            _add(names, own.replace(_BODY, f"{body}.", 1), name, self.found)
        tensors = self._files.read(names.values())
        return {own: tensors[name] for own, name in names.items()}


def _add(names: dict[str, str], own: str, name: str, found: FinishedModel) -> None:
    """Add the name in the files of the tensor `own` of a part.

    Raises:
        UserError: The files have it under another name, too.
    """
    if own in names:
        raise UserError(
            f"{WHERE}: {found.name} has one tensor under two names, {names[own]} and {name}; which "
            "of the two belongs to the model is unknown, copy the folder again",
            code="tensors_differ",
        )
    names[own] = name


def _with_weights(found: FinishedModel) -> Path:
    """Return the folder with the weights, which are fetched if the name is one of the hub."""
    if found.folder == Path(found.name).expanduser():
        return found.folder
    folder = small_files(found.name, patterns=["*.safetensors"])
    if not list(folder.glob("*.safetensors")) or found.weights != "full":
        small_files(found.name, patterns=["*.bin"])
    return folder


def _weight_paths(folder: Path, found: FinishedModel) -> list[Path]:
    """Return the weight files, of several sets the one that transformers takes."""
    if found.weights == "projector":
        names = [["mm_projector.bin"]]
    elif found.weights == "lora":
        names = [["non_lora_trainables.safetensors", "non_lora_trainables.bin"]]
    else:
        names = [["model.safetensors", "pytorch_model.bin"]]
        for file in names[0]:
            index = folder / f"{file}.index.json"
            if (folder / file).is_file():
                break
            if index.exists():
                with library_call("json", str(index), "read this index"):
                    files = sorted(set(read_json(index)["weight_map"].values()))
                names = [[str(file)] for file in files]
                break
    paths = []
    for alternatives in names:
        existing = [folder / name for name in alternatives if (folder / name).is_file()]
        if not existing:
            raise UserError(
                f"{WHERE}: {found.name} has no {' or '.join(alternatives)}; take a complete folder",
                code="tensors_differ",
            )
        paths.append(existing[0])
    return paths


def _place(name: str, found: FinishedModel) -> tuple[Part | None, str] | None:
    """Return the part of a tensor of a folder, and its name there.

    Returns:
        None for a tensor that belongs to no part; a part of None for one that is computed anew.
    """
    if name.endswith(".rotary_emb.inv_freq"):  # files from before transformers 4.32
        return None, name
    return (_place_released if found.layout == "transformers" else _place_original)(name)


def _place_released(name: str) -> tuple[Part, str] | None:
    """Place names as released folders have them, and as transformers has them in memory."""
    if name == "lm_head.weight":
        return "language_model", name
    if name in (IMAGE_NEWLINE, f"model.{IMAGE_NEWLINE}"):
        return "multi_modal_projector", IMAGE_NEWLINE
    if name.startswith("model."):
        inner = name.removeprefix("model.")
        if inner.startswith("language_model."):  # the model without its head
            return "language_model", _BODY + inner.removeprefix("language_model.")
        name = inner
    part, _, own = name.partition(".")
    if part == "vision_tower":
        # transformers 5.6 dropped this level of CLIP and SigLIP.
        return "vision_tower", own.removeprefix("vision_model.")
    if part == "multi_modal_projector":
        return "multi_modal_projector", own
    return ("language_model", own) if part == "language_model" else None


_BODY: Final = "<body>."
"""Replaced by the prefix of the language model's class, which a name alone does not give."""


def _place_original(name: str) -> tuple[Part, str] | None:
    name = name.removeprefix("base_model.model.")
    if ".mm_projector." in f".{name}":
        own = name.partition("mm_projector.")[2]
        index, _, kind = own.rpartition(".")
        if not index:
            return "multi_modal_projector", kind
        layer = int(index) // 2 + 1 if index.isdigit() else index
        return "multi_modal_projector", f"linear_{layer}.{kind}"
    if name.startswith("model.vision_tower."):
        own = name.removeprefix("model.vision_tower.").removeprefix("vision_tower.")
        return "vision_tower", own.removeprefix("vision_model.")
    if name == f"model.{IMAGE_NEWLINE}":
        return "multi_modal_projector", IMAGE_NEWLINE
    return "language_model", name


# --- the parts


def load_encoder(
    found: FinishedModel, config: PretrainedConfig, model_class: Any
) -> PreTrainedModel:
    """Load the vision tower of a folder of transformers, in float32.

    Args:
        found: The description of the finished model.
        config: Configuration of the tower.
        model_class: Class of transformers for it, or `AutoModel`.

    Raises:
        UserError: Tensors are missing, unexpected or of another shape.
    """
    if model_class is AutoModel:
        model_class = cast(Any, AutoModel)._model_mapping[type(config)]
    state = FinishedWeights(found).read("vision_tower")
    return _from_state(model_class, config, state, found, "vision_tower", dtype=torch.float32)


def load_finished_language_model(
    weights: FinishedWeights, *, dtype: torch.dtype | str, attention: str | None
) -> PreTrainedModel:
    """Load the language model of a finished model that contains it.

    Args:
        weights: The weights of the finished model.
        dtype: Of the weights; "auto" for that of the file.
        attention: Attention by the name of transformers; None for its choice.

    Raises:
        UserError: Tensors are missing, unexpected or of another shape.
    """
    found, config = weights.found, language_config(weights.found)
    classes: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in classes:
        raise UserError(
            f"{WHERE}: transformers has no causal language model for the text_config of "
            f"{found.name} ({config.model_type})"
        )
    model_class = classes[type(config)]
    state = weights.read("language_model", body=model_class.base_model_prefix)
    config.tie_word_embeddings &= _can_be_tied(model_class, state)
    model = _from_state(
        model_class,
        config,
        state,
        found,
        "language_model",
        dtype=dtype,
        attn_implementation=attention,
    )
    named: Any = model
    named.name_or_path = named.config._name_or_path = found.name
    generation = weights.folder / "generation_config.json"
    if generation.exists():
        with library_call("transformers", WHERE, f"read {generation}"):
            named.generation_config = GenerationConfig.from_dict(read_json(generation))
    return model


def _can_be_tied(model_class: Any, state: Mapping[str, Tensor]) -> bool:
    """Return whether the head has no weights of its own, whatever the configuration states.

    InternVL's folders of transformers 4 state no tie for the whole model, whose default is now one.
    """
    tied = getattr(model_class, "_tied_weights_keys", None)
    return all(
        torch.equal(state[head], state[table])
        for head, table in (tied.items() if isinstance(tied, dict) else ())
        if head in state and table in state
    )


def language_config(found: FinishedModel, tree: Mapping[str, Any] | None = None) -> Any:
    """Return the configuration of a finished model's language model, with a plain output head.

    Args:
        found: The description of the finished model.
        tree: Its configuration; None: that in its folder.

    Raises:
        UserError: transformers cannot read it.
    """
    if found.layout == "transformers":
        whole: Any
        if tree is None:
            whole = load_pretrained(AutoConfig.from_pretrained, str(found.folder), WHERE)
        else:
            whole = AutoConfig.for_model(**tree)
        config: Any = copy.deepcopy(whole.get_text_config())
        # The head of LLaVA's class is a plain matrix, tied if the outer configuration says so.
        config.tie_word_embeddings = bool(whole.tie_word_embeddings)
        for name, neutral in _PLAIN_HEAD.items():
            if getattr(config, name, None) is not None:
                setattr(config, name, neutral)
        return config
    tree = tree or cast(dict[str, Any], read_json(found.folder / "config.json"))
    kind = ORIGINAL_LANGUAGE_MODELS[tree["model_type"]]
    own = {key: value for key, value in tree.items() if not key.startswith(_ORIGINAL_KEYS)}
    with library_call("transformers", WHERE, f"read the config.json of {found.name!r}"):
        return AutoConfig.for_model(kind, **own)


_PLAIN_HEAD: Final = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}


def stored_dtype(found: FinishedModel) -> torch.dtype:
    """Return the dtype that a finished model's configuration states; float32 if it states none."""
    tree: dict[str, Any] = read_json(found.folder / "config.json")
    for section in (tree, tree.get("text_config") or {}):
        name = section.get("dtype") or section.get("torch_dtype")
        if name in STORED_DTYPES:
            return STORED_DTYPES[name]
    return torch.float32


def load_finished_projector(weights: FinishedWeights, live: Mapping[str, Tensor]) -> None:
    """Copy the projector of a finished model, and its `image_newline`, into live tensors.

    Args:
        weights: The weights of the finished model.
        live: As `VisionLanguageModel.projector_state` returns them.

    Raises:
        UserError: Tensors are missing, unexpected or of another shape, or the second layer of a
            linear projector is more than an identity.
    """
    found, state = weights.found, weights.read("multi_modal_projector")
    if "weight" in live and "linear_1.weight" in state:  # one linear layer, then an identity
        state = _without_identity(found, state)
    missing = sorted(live.keys() - state.keys())
    unexpected = sorted(state.keys() - live.keys())
    shapes = [
        (name, state[name].shape, live[name].shape)
        for name in live.keys() & state.keys()
        if state[name].shape != live[name].shape
    ]
    _require_same(found.name, missing, unexpected, shapes, "multi_modal_projector")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(state[name])


def _without_identity(found: FinishedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the one layer of a linear projector that transformers holds as two layers."""
    second, bias = state.pop("linear_2.weight", None), state.pop("linear_2.bias", None)
    is_identity = second is not None and second.shape[0] == second.shape[1]
    if is_identity:
        assert second is not None
        is_identity = torch.equal(second.float(), torch.eye(second.shape[0]))
    if not is_identity or bias is None or bias.any():
        raise UserError(
            f"{WHERE}: {found.name} has a projector of two layers without activation "
            "(projector_hidden_act 'linear'), whose second layer is expected to be an identity"
        )
    return {name.removeprefix("linear_1."): tensor for name, tensor in state.items()}


def load_finished_tower(weights: FinishedWeights, encoder: nn.Module) -> None:
    """Copy the vision tower of an original folder, if it contains one, into the live encoder.

    Raises:
        UserError: Tensors are missing, unexpected or of another shape.
    """
    names = {name for name in weights.names("vision_tower") if not name.endswith("position_ids")}
    if not names:
        return
    live = {name.removeprefix("vision_model."): v for name, v in encoder.state_dict().items()}
    state = {n: tensor for n, tensor in weights.read("vision_tower").items() if n in names}
    shapes = [
        (name, state[name].shape, live[name].shape)
        for name in sorted(live.keys() & names)
        if state[name].shape != live[name].shape
    ]
    missing, unexpected = sorted(live.keys() - names), sorted(names - live.keys())
    _require_same(weights.found.name, missing, unexpected, shapes, "vision_tower")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(state[name])


def merge_adapter(weights: FinishedWeights, language_model: PreTrainedModel) -> PreTrainedModel:
    """Return the base language model with the LoRA adapters of an original folder merged into it.

    Raises:
        UserError: The adapters are of another language model.
    """
    from peft import PeftConfig
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    from vlm_sft.model.lora import with_adapters

    folder, name = weights.folder, weights.found.name
    with library_call("peft", WHERE, f"read the adapter_config.json of {name!r}"):
        config: Any = PeftConfig.from_pretrained(str(folder), trust_remote_code=False)
    config.inference_mode, config.base_model_name_or_path = False, None
    with library_call("peft", WHERE, f"put the adapters of {name!r} on this language model"):
        model: Any = with_adapters(language_model, config)
    paths = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    existing = [path for path in paths if path.is_file()]
    if not existing:
        raise UserError(
            f"{WHERE}: {name} has no adapter_model.safetensors or adapter_model.bin; take a "
            "complete folder",
            code="tensors_differ",
        )
    files = WeightFiles(existing[:1])
    state = files.read(files.names)
    # peft ignores missing and unexpected tensors.
    live: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = [
        (key, state[key].shape, live[key].shape)
        for key in sorted(live.keys() & state.keys())
        if state[key].shape != live[key].shape
    ]
    missing, unexpected = sorted(live.keys() - state.keys()), sorted(state.keys() - live.keys())
    _require_same(name, missing, unexpected, shapes)
    set_peft_model_state_dict(model, state)
    merged: PreTrainedModel = model.merge_and_unload()
    merged_config: Any = merged.config
    merged_config._name_or_path = name
    return merged


def _from_state(
    model_class: Any,
    config: PretrainedConfig,
    state: dict[str, Tensor],
    found: FinishedModel,
    part: Part,
    **settings: Any,
) -> PreTrainedModel:
    action = f"load the {part} of {found.name!r}"
    with library_call("transformers", WHERE, action), torch.device("meta"):
        live: dict[str, Tensor] = model_class(copy.deepcopy(config)).state_dict()
    shapes = [
        (key, state[key].shape, live[key].shape)
        for key in sorted(live.keys() & state.keys())
        if state[key].shape != live[key].shape
    ]
    if len(shapes) == len(live.keys() & state.keys()):  # a configuration of another model
        # Before memory is allocated for what may be a much larger model.
        _require_same(found.name, [], [], shapes, part)
    with library_call("transformers", WHERE, action), _without_load_report():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **settings,
        )
    _require_same(
        found.name,
        sorted(info["missing_keys"]),
        sorted(info["unexpected_keys"]),
        sorted(info["mismatched_keys"]),
        part,
    )
    return cast(PreTrainedModel, model)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence the table of missing and unexpected tensors, which are an error of their own."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _require_same(
    name: str,
    missing: list[str],
    unexpected: list[str],
    shapes: list[tuple[str, Any, Any]],
    part: Part | None = None,
) -> None:
    """Refuse tensors that are missing, unexpected or of another shape.

    Raises:
        UserError: Lists the first names of each kind.
    """
    prefix = f"{part}." if part else ""
    wrong_shapes = [
        f"{_full(prefix, key)} is {_shape(found)} instead of {_shape(wanted)}"
        for key, found, wanted in shapes
    ]
    kinds: Mapping[str, list[str]] = {
        "missing": [_full(prefix, key) for key in missing],
        "unexpected": [_full(prefix, key) for key in unexpected],
        "of another shape": wrong_shapes,
    }
    wrong = [
        f"{len(names)} {kind} ({', '.join(names[:_LISTED])}{', ...' * (len(names) > _LISTED)})"
        for kind, names in kinds.items()
        if names
    ]
    if wrong:
        raise UserError(
            f"{WHERE}: the tensors of {name} are not those of its config.json: "
            f"{'; '.join(wrong)}; nothing was loaded",
            code="tensors_differ",
        )


def _full(prefix: str, name: str) -> str:
    return name if name == IMAGE_NEWLINE else prefix + name


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a scalar"
