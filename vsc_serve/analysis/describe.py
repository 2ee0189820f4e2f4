"""Say what a path is: a run, a bundle, a codes file, or a folder of them."""

from pathlib import Path
from typing import Any, Final

from vsc_serve.bundle import LINEAR_MAP, MANIFEST, open_bundle
from vsc_serve.codes import CodeStatistics, is_shard_folder, part_paths, read_codes
from vsc_serve.domain import read_reference
from vsc_serve.errors import InputError, UsageError
from vsc_serve.options import query_tau
from vsc_serve.schema import load_json
from vsc_serve.untrusted import is_folder, is_plain, read_plain

_RUN_SUMMARY: Final = "run.json"
"""Written by `vsc train`; read here as JSON, so that the runtime needs no torch to show a run."""
_MAX_SUMMARY_BYTES: Final = 2**23
_OLD_METRICS: Final = "figures"
"""Key of the metrics in runs of an earlier release."""


def describe(path: Path) -> dict[str, Any]:
    """Return facts about a run folder, a bundle, a codes file or a folder of shards, by name.

    Raises:
        UsageError: Nothing there, or nothing of these.
        BundleError: A bundle that is damaged.
        InputError: A file that is damaged.
    """
    if is_plain(path) or is_shard_folder(path):
        return _describe_codes(path)
    if is_plain(path / MANIFEST):
        return _describe_bundle(path)
    if is_plain(path / _RUN_SUMMARY):
        return _describe_run(path)
    if is_folder(path):
        raise UsageError(
            f"{path}: neither a run ({_RUN_SUMMARY}) nor a bundle or shards ({MANIFEST})"
        )
    raise UsageError(f"{path}: no regular file or folder is there. Check the path.")


def _describe_bundle(path: Path) -> dict[str, Any]:
    bundle = open_bundle(path)
    manifest, reference = bundle.manifest, read_reference(bundle)
    takes = str(manifest.pixel_spec) if manifest.pixel_spec else f"vectors of {manifest.input_dim}"
    if manifest.backbone is not None:
        takes += f", through a backbone of {manifest.backbone['dim']} dimensions"
    return {
        "kind": f"model bundle, format {manifest.format}, all digests right",
        "name": manifest.name,
        "digest": manifest.digest,
        "input": takes,
        "latents": manifest.latent_dim,
        "tau": manifest.tau,
        "query_tau": query_tau(manifest),
        "alpha": manifest.alpha,
        "active": manifest.active,
        "opset": manifest.opset,
        "linear map": "yes" if LINEAR_MAP in manifest.files else "no",
        "own data": "not recorded" if reference is None else str(reference),
        "bytes": sum((path / name).stat().st_size for name in manifest.files),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }


def _describe_run(path: Path) -> dict[str, Any]:
    try:
        stored = load_json(read_plain(path / _RUN_SUMMARY, _MAX_SUMMARY_BYTES))
        recipe = stored["recipe"]
        metrics = stored["metrics"] if "metrics" in stored else stored[_OLD_METRICS]
        return {
            "kind": f"training run, format {stored['format']}",
            "name": stored["name"],
            "step": f"{stored['step']} of {recipe['steps']}",
            "latents": recipe["latent_dim"],
            "alpha": recipe["alpha"],
            "data": stored["data_fingerprint"],
            **metrics,
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / _RUN_SUMMARY}: damaged ({error!r}). Train again.") from error


def _describe_codes(path: Path) -> dict[str, Any]:
    stored, files = read_codes(path), part_paths(path)
    shards = f", in {len(files)} shards" if is_folder(path) else ""
    members = ("gamma", "sigma", "digests")
    optional = [name for name in members if getattr(stored, name) is not None]
    return {
        "kind": f"sparse codes, format {stored.meta.get('format', 'plain scipy')}{shards}",
        **{name: value for name, value in stored.meta.items() if name != "format"},
        **CodeStatistics.of(stored.codes).summary(),
        "entries": stored.codes.nnz,
        **({"also holds": ", ".join(optional)} if optional else {}),
        "bytes": sum(file.stat().st_size for file in files),
        "first id": stored.ids[0] if stored.ids else "",
    }
