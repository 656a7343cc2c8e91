"""Checkpoints in and out: our own, Hugging Face's, OpenAI's.

    open_checkpoint("openai/imagegpt-small")               # a directory, a run, a TF1 prefix, a hub id, builtin:emoji
    save(model, "out", format="hf")
    convert("ckpt/model.ckpt-1000000", "out", format="hf")  # tensor by tensor, without a model

A checkpoint is a configuration and tensors by our names, not read yet; each format is a way to open one and a way to
write one. Nothing in a file is executed, and no name in a file leads outside its directory.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from igpt.config import Blocks, Config
from igpt.convert import hf_keys, hf_vit_keys, runs, tf_checkpoint
from igpt.convert.tensors import Lazy, read_json, read_safetensors, write_safetensors
from igpt.palette import FILES as PALETTES
from igpt.palette import Palette

FORMATS = ("igpt", "hf")
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PROCESSOR = "preprocessor_config.json"
WRITTEN = {WEIGHTS, CONFIG, "palette.npy", PROCESSOR, runs.TRAINING}  # what save() may replace
LAYOUTS = (hf_keys, hf_vit_keys)  # a module for each model: its configuration, its parameters, Hugging Face's names
BUILT_IN = {"builtin:emoji": Path(__file__).parents[1] / "assets" / "emoji"}
MAX_LAYERS = 1024
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_FILES = ("*.safetensors", INDEX, CONFIG, *PALETTES, "pytorch_model.bin.index.json")
SAFELY = """python -c "import torch; from safetensors.torch import save_file; save_file({k: v.clone() for k, v in
torch.load('pytorch_model.bin', weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})" """


@dataclass(frozen=True)
class Checkpoint:
    """format "igpt", "hf" or "tf"; tensors by our parameters' names, checked to be exactly those of `config`; trained:
    where in its run one of ours was made; classes: what the classifier's rows are called, empty where nobody said."""

    format: str
    config: Blocks
    tensors: dict[str, Lazy]
    palette: Palette | None = None
    remarks: tuple[str, ...] = ()
    trained: runs.Trained | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        check(self.config, self.tensors)
        named = all(isinstance(name, str) for name in self.classes)
        if self.classes and (len(self.classes) != self.config.classes or not named):
            raise ValueError(f"class_names: got {self.classes!r:.80}, expected {self.config.classes} strings")

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["norm_f"].dtype


def save(model, path, format: str = "igpt", *, palette: Palette | None = None) -> None:
    """Write model.safetensors, config.json and the palette (default: `model.palette`, if it has one) into directory
    `path`: all of it or nothing. An earlier model there is replaced, anything else refused."""
    tensors = {name: Lazy.of(parameter) for name, parameter in model.named_parameters()}
    palette = palette or getattr(model, "palette", None)
    write(Checkpoint("igpt", model.config, tensors, palette, classes=model.class_names), path, format)


def convert(
    source, path, format: str = "igpt", *, step: int | str | None = None, dtype: torch.dtype | None = None,
    palette=None, attn_scale: str = "exact",
) -> dict:  # fmt: skip
    """From any format into directory `path`, a tensor at a time; floating tensors as `dtype` if given. `step` and
    `attn_scale` as in open_checkpoint; `palette`: a Palette, or a file or directory of one, instead of the source's
    own. Returns a summary for people and programs."""
    checkpoint = open_checkpoint(source, step, attn_scale)
    if Path(source).is_dir() and Path(path).resolve() == Path(source).resolve():
        raise ValueError(f"path: got {path}, the source itself; expected another directory")
    if palette is not None and not isinstance(palette, Palette):
        palette = Palette.load(palette)
    size = write(checkpoint, path, format, dtype, palette)
    dtype = str(dtype or checkpoint.dtype).removeprefix("torch.")
    return {"source": str(source), "source_format": checkpoint.format, "path": str(path), "format": format,
            "dtype": dtype, "tensors": len(checkpoint.tensors), "bytes": size, "remarks": list(checkpoint.remarks),
            "trained": checkpoint.trained and checkpoint.trained._asdict(), "classes": list(checkpoint.classes),
            "config": checkpoint.config.to_dict()}  # fmt: skip


def open_checkpoint(source, step: int | str | None = None, attn_scale: str = "exact") -> Checkpoint:
    """Find out the format, read and check every header. A run directory stands for its best checkpoint, or for that of
    `step`, a number or "last" (runs.py); "builtin:emoji" for the model in the box (igpt/assets/emoji/README.md).
    attn_scale, of Hugging Face's: "exact" is 1/sqrt(head dim), as OpenAI's code has it, "hf" what their port divides
    by, int(sqrt(head dim)). Raises ValueError."""
    if attn_scale not in hf_keys.SCALES:
        raise ValueError(f"attn_scale: got {attn_scale!r}, expected one of {hf_keys.SCALES}")
    path = BUILT_IN.get(str(source)) or Path(source)
    if runs.is_run(path):
        path = runs.resolve(path, step)
    elif step is not None:
        raise ValueError(f"step: got {step!r}, but {source} is no run directory")
    if path.is_dir():
        checkpoint = _open_directory(path, attn_scale)
    elif tf_checkpoint.is_bundle(path):
        checkpoint = _open_tf(path)
    elif path.exists():
        raise ValueError(f"source: {path} is a file; expected a directory or a TF1 checkpoint prefix")
    else:
        checkpoint = _open_directory(_download(str(source)), attn_scale)
    if attn_scale != "exact" and checkpoint.format != "hf":
        raise ValueError(f"attn_scale: got {attn_scale!r}, but {source} is no checkpoint of Hugging Face's")
    for remark in checkpoint.remarks:
        warnings.warn(f"{source}: {remark}", stacklevel=3)
    return checkpoint


def _open_directory(path: Path, attn_scale: str) -> Checkpoint:
    if not (path / CONFIG).is_file():
        prefixes = sorted(path.glob("*.index"))
        if len(prefixes) == 1:
            return _open_tf(prefixes[0])
        if prefixes:
            raise ValueError(f"source: {path} holds several checkpoints, expected one of {[str(p) for p in prefixes]}")
        raise ValueError(f"source: {path} holds neither {CONFIG} nor a TF1 checkpoint's .index")
    values, tensors = read_json(path / CONFIG), _read_weights(path)
    try:
        palette = _palette_in(path)
        kind, ours = values.get("model_type"), values.pop("format", None)
        for layout in LAYOUTS:
            if kind == layout.MODEL_TYPE:
                processor = read_json(path / PROCESSOR) if (path / PROCESSOR).is_file() else {}
                hf_keys.require_neutral(PROCESSOR, processor, layout.REFUSED_PROCESSOR)
                config, tensors, remarks = layout.from_hf(values, tensors, attn_scale)
                names = hf_keys.class_names(values, config.classes)
                return Checkpoint("hf", config, tensors, palette, tuple(remarks), classes=names)
            if ours == layout.FORMAT:
                names = tuple(values.pop("class_names", ()))
                config, trained = layout.CONFIG.from_dict(values), runs.Trained.of(path)
                return Checkpoint("igpt", config, tensors, palette, trained=trained, classes=names)
        known = " or ".join(f"{layout.MODEL_TYPE!r} (ours: format {layout.FORMAT!r})" for layout in LAYOUTS)
        raise ValueError(f"{CONFIG}: got model_type {kind!r:.80}, expected {known}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _open_tf(prefix: Path) -> Checkpoint:
    config, tensors = tf_checkpoint.read(prefix)
    return Checkpoint("tf", config, tensors, _palette_in(prefix.parent))


def _palette_in(path: Path) -> Palette | None:
    for name in PALETTES:
        file = path / name
        # A processor's configuration need not hold clusters.
        if file.is_file() and (file.suffix != ".json" or read_json(file).get("clusters") is not None):
            return Palette.load(file)
    return None


def _read_weights(path: Path) -> dict[str, Lazy]:
    """Every tensor of model.safetensors, of the shards that its index names, or of a run's checkpoint."""
    if (path / WEIGHTS).is_file():
        return read_safetensors(path / WEIGHTS)
    if (path / runs.SIZES).is_file():
        return runs.read_weights(path)
    if not (path / INDEX).is_file():
        if found := [name for name in PICKLES if (path / name).is_file()]:
            raise ValueError(
                f"source: {path / found[0]} is a pickle, which can run code when loaded, and is never opened here. "
                f"Where you trust it, convert it once with\n{SAFELY}"
            )
        raise ValueError(f"source: {path} holds neither {WEIGHTS} nor {INDEX}")
    places = read_json(path / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{path / INDEX}: got no weight_map of names to files")
    tensors = {}
    for shard in sorted(set(places.values())):
        if shard != os.path.basename(shard) or not shard.endswith(".safetensors") or "\0" in shard:
            raise ValueError(f"{path / INDEX}: got file {shard!r:.80}, expected a .safetensors name in this directory")
        for name, tensor in read_safetensors(path / shard).items():
            if places.get(name) != shard:
                raise ValueError(f"{path / shard}: holds {name!r:.80}, which the index places in {places.get(name)!r}")
            tensors[name] = tensor
    if missing := sorted(places.keys() - tensors):
        raise ValueError(f"{path}: the index names {len(missing)} tensors that no shard holds: {missing[:5]}")
    return tensors


def _download(source: str) -> Path:
    """The directory of a hub repository's files, without pickles."""
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ValueError(f"source: {source!r} is no directory, TF1 checkpoint prefix or hub id (org/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"source: no directory {source!r}; as a hub id it needs: pip install 'igpt[hf]'") from error
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors are OSErrors
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"source: there is no directory {source!r}, and as a hub id it failed: {reason}") from error
    if (path / CONFIG).is_file() and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"source: {source!r} has no safetensors on the hub, and a pickle, which can run code when loaded, is never "
            "fetched. Name a revision that has them (org/name@refs/pr/N), or, where you trust the pickle, download it "
            f"and convert it once with\n{SAFELY}"
        )
    return path


def layout_of(config: Blocks):
    return next(layout for layout in LAYOUTS if type(config) is layout.CONFIG)


def shapes(config: Blocks) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter of this config's model, without building one."""
    return layout_of(config).shapes(config)


def check(config: Blocks, tensors: dict[str, Lazy]) -> None:
    """Raises ValueError unless the tensors are exactly the parameters of this config's model, floats of one dtype."""
    if config.n_layer > min(MAX_LAYERS, len(tensors)):
        raise ValueError(f"n_layer: got {config.n_layer} with {len(tensors)} tensors, expected at most {MAX_LAYERS}")
    wanted = shapes(config)
    if missing := sorted(wanted.keys() - tensors):
        raise ValueError(f"tensors: {len(missing)} are missing: {missing[:5]}")
    if unknown := sorted(tensors.keys() - wanted):
        raise ValueError(f"tensors: {len(unknown)} are unknown: {unknown[:5]}")
    dtypes = {str(t.dtype) for t in tensors.values()}
    if len(dtypes) > 1 or not tensors["norm_f"].dtype.is_floating_point:
        raise ValueError(f"tensors: got dtypes {sorted(dtypes)}, expected one floating dtype")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name}: got shape {tensors[name].shape}, expected {shape}")


def write(checkpoint: Checkpoint, path, format: str, dtype: torch.dtype | None = None, palette=None) -> int:
    """Write a directory, all of it or nothing; returns the weights' size in bytes."""
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}, expected one of {FORMATS}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}, expected a floating dtype")
    config, tensors = checkpoint.config, checkpoint.tensors
    palette = palette or checkpoint.palette
    if palette is not None:
        if not isinstance(config, Config):
            raise ValueError(f"palette: got {palette}, expected None: a ViT reads pixels")
        palette.require(config.vocab)
    if format == "hf":
        how = dtype or checkpoint.dtype, checkpoint.classes, palette
        values, processor, tensors = layout_of(config).to_hf(config, tensors, *how)
    with _replaced(Path(path)) as directory:
        size = write_safetensors(directory / WEIGHTS, tensors, dtype)
        if format == "igpt":
            describe(directory, config, palette, checkpoint.trained, checkpoint.classes)
        else:
            _write_json(directory / CONFIG, values)
            if processor is not None:
                _write_json(directory / PROCESSOR, processor)
    return size


def describe(
    directory: Path, config: Blocks, palette: Palette | None, trained: runs.Trained | None,
    classes: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """All of a model of ours but its weights, durably: of an export, and of a run's checkpoint."""
    names = {"class_names": list(classes)} if classes else {}
    _write_json(directory / CONFIG, {"format": layout_of(config).FORMAT} | config.to_dict() | names)
    if palette is not None:
        palette.save(directory / "palette.npy")
        _fsync(directory / "palette.npy")
    if trained is not None:
        _write_json(directory / runs.TRAINING, trained._asdict())


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A new directory that takes `path`'s name when the block ends, and vanishes if it raises.

    What stands at `path` must be absent, empty, or an earlier model and nothing else. It keeps its name until the new
    one is on the disk, and another name until the new one has its."""
    path = path.resolve()
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
    try:
        yield new
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)  # mkdtemp's is private
        _fsync(new)
        _check_replaceable(path)
        if path.exists() and any(path.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            path.rename(old)
            new.rename(path)
            shutil.rmtree(old)
        else:
            new.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"path: {path} is a file, expected a directory")
    found = {entry.name for entry in path.iterdir()}
    if foreign := sorted(found - WRITTEN):
        raise ValueError(f"path: {path} holds files that aren't this model's: {foreign[:5]}; expected a new directory")
    if found:
        values = read_json(path / CONFIG)
        if all(values.get("format") != x.FORMAT and values.get("model_type") != x.MODEL_TYPE for x in LAYOUTS):
            raise ValueError(f"path: {path} holds another model, expected a new directory")


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
