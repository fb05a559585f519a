"""What `weightsmith build` is asked to make: recipes, gates and builds of registry.yaml, as a list of jobs.

    recipes:
      q4:                            # the tag that results get, unless a build names another
        target: gguf:Q4_K_M          # required; what `quantize --to` and `convert --to` take
        effort: normal               # every other key is an option of `quantize`: effort, calibrate, field, rows, ctx,
        calibrate: calib.txt         #   seed, imatrix, group_size, sym, tensor_types, output_type, embedding_type,
        tensor_types: {attn_v: Q6_K} #   pure, strict, split, pre, allow_pickle
    gates:
      close:
        max_kld: 0.05                # mean KL divergence against the original, nats per token
        max_ppl_ratio: 1.02
        min_top1: 0.9                # share of predictions whose most likely token is the same
        max_bytes: 5GB               # of all files
        licences: [Apache-2.0, MIT]  # the model's must be one of these
        text: eval.txt               # measured on this, as ctx, windows, convention say; else on the built-in text
    builds:
      small:
        model: [llama-3.1-8b, mine]  # names of `models`; or `from: BUILD`, to start from what another build makes
        recipe: [q4, q8]             # each model by each recipe
        gate: close
        alias: prod                  # moves to the result when every gate is passed

Files are named as seen from the registry's own folder. `calibrate` takes what `quantize --calibrate` takes; a dataset
on the hub must be pinned to a commit. Recipes and gates are found as models are (the shipped file, HOME/registry.yaml,
the given one, later ones win); builds only in the given file, or the one in the current folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith import jobs, texts
from weightsmith.calibrated import PACKED, Calibration
from weightsmith.errors import NotFoundError, UsageError
from weightsmith.quant.blocks import BLOCKS
from weightsmith.sizes import parse_size
from weightsmith.sources import dataset, registry
from weightsmith.sources.source import COMMIT
from weightsmith.suggest import did_you_mean
from weightsmith.types import Recipe

if TYPE_CHECKING:
    from weightsmith.sources.marked_yaml import Document

ORIGINAL = "original"
_SETTINGS = ("rows", "ctx", "seed", "group_size", "sym")


@dataclass(frozen=True, slots=True)
class Gate:
    """Limits that a result must keep; None: no limit. text: a file to measure on, None: the built-in prose."""

    name: str
    max_kld: float | None = None
    max_ppl_ratio: float | None = None
    min_top1: float | None = None
    max_bytes: int | None = None
    licences: tuple[str, ...] | None = None
    text: Path | None = None
    ctx: int | None = None
    windows: int | None = None
    convention: str = "llama.cpp"

    @property
    def is_measured(self) -> bool:
        """Whether the model has to run to decide it."""
        return any(limit is not None for limit in (self.max_kld, self.max_ppl_ratio, self.min_top1))

    def limits(self) -> dict[str, Any]:
        """The limits that are set, as plain values."""
        names = ("max_kld", "max_ppl_ratio", "min_top1", "max_bytes", "licences")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return found | ({"licences": list(self.licences)} if self.licences is not None else {})


@dataclass(frozen=True, slots=True)
class Calibrate:
    """A text that a recipe calibrates on, not read yet: a file, a dataset or "self", its records' field, its use."""

    named: str
    field: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def load(self, *, home: Path, offline: bool) -> Calibration:
        """Read it, or fetch it; raises what `texts.find` raises."""
        text = texts.find(self.named, home=home, field=self.field, offline=offline)
        return Calibration(text, **dict(self.settings))


@dataclass(frozen=True, slots=True)
class Job:
    """One entry of the catalog to be there: a pulled model (`source`), or `recipe` applied to what `parent` names.

    ref: `name:tag`. builds: the builds that ask for it. place: file and line where it stands.
    """

    name: str
    tag: str
    place: str
    builds: tuple[str, ...] = ()
    source: registry.RegistryEntry | None = None
    registry: Path | None = None
    parent: str | None = None
    recipe_name: str = ""
    target: jobs.Target | None = None
    options: jobs.Options = field(default_factory=jobs.Options)
    calibrate: Calibrate | None = None
    gates: tuple[Gate, ...] = ()
    aliases: tuple[str, ...] = ()
    licence: str | None = None

    @property
    def ref(self) -> str:
        """`name:tag`."""
        return f"{self.name}:{self.tag}"


def read(given: Path | None, *, home: Path, known: Iterable[str] = ()) -> list[Job]:
    """Every job of the registry, each after what it needs. known: models that are in the catalog without being named.

    Raises UsageError naming file and line, NotFoundError if there is no registry to build from.
    """
    files = registry.files(given, home=home)
    wanted = given or Path("registry.yaml").absolute()
    if not wanted.is_file():
        raise NotFoundError("no registry.yaml here", path=Path.cwd(), hint="Pass --registry FILE, or write one.")
    models: dict[str, registry.RegistryEntry] = {}
    recipes: dict[str, tuple[Any, Document]] = {}
    gates: dict[str, Gate] = {}
    document = None
    for file in files:
        document = registry.checked(file)
        models |= registry.models(document)
        recipes |= {name: (raw, document) for name, raw in document.data.get("recipes", {}).items()}
        gates |= {name: _gate(name, raw, document) for name, raw in document.data.get("gates", {}).items()}
    if document is None or not document.file.samefile(wanted):
        document = registry.checked(wanted)
    planner = _Planner(document, models, recipes, gates, set(known))
    for name in document.data.get("builds", {}):
        planner.build(name)
    return planner.ordered()


def chosen(plan: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The jobs that `names` (builds, models, or `name:tag`) ask for, and what those need; all of them without names."""
    if not names:
        return list(plan)
    by_ref = {job.ref: job for job in plan}
    refs: set[str] = set()
    for name in names:
        found = [job.ref for job in plan if name in (job.ref, job.name, *job.builds)]
        if not found:
            known = {job.ref for job in plan} | {build for job in plan for build in job.builds}
            hint = did_you_mean(name, known) or "`weightsmith build --dry-run` lists them."
            raise NotFoundError(f"no build {name!r} in the registry", hint=hint)
        refs |= set(found)
    for ref in list(refs):
        parent = by_ref[ref].parent
        while parent is not None and parent in by_ref:
            refs.add(parent)
            parent = by_ref[parent].parent
    return [job for job in plan if job.ref in refs]


@dataclass(slots=True)
class _Planner:
    """Turns builds into jobs, following `from`."""

    document: Document
    models: dict[str, registry.RegistryEntry]
    recipes: dict[str, tuple[Any, Document]]
    gates: dict[str, Gate]
    known: set[str]
    made: dict[str, list[Job]] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    under_way: list[str] = field(default_factory=list)

    def build(self, name: str) -> list[Job]:
        """The jobs of build `name`; those of the build that it starts from are planned first."""
        if name in self.made:
            return self.made[name]
        if name in self.under_way:
            raise self._fault(name, "from", f"goes round in circles: {' -> '.join([*self.under_way, name])}")
        self.under_way.append(name)
        raw = self.document.data["builds"][name]
        parents = self._parents(name, raw)
        recipes = _listed(raw["recipe"])
        if "tag" in raw and len(recipes) > 1:
            raise self._fault(name, "tag", "one tag cannot serve several recipes; leave it out, or make two builds")
        made = [self._job(name, raw, parent, recipe) for parent in parents for recipe in recipes]
        self.under_way.pop()
        self.made[name] = made
        return made

    def ordered(self) -> list[Job]:
        """All jobs, parents first; raises if two want the same alias."""
        claimed: dict[str, Job] = {}
        for job in self.jobs.values():
            for alias in job.aliases:
                ref = f"{job.name}:{alias}"
                other = claimed.setdefault(ref, job)
                if other is not job:
                    raise UsageError(f"{ref} is to be the alias of {other.ref} and of {job.ref}", path=job.place)
                if ref in self.jobs:
                    raise UsageError(f"{ref} is to be an alias and a result", path=job.place)
        return list(self.jobs.values())

    def _parents(self, name: str, raw: Any) -> list[Job]:
        if ("model" in raw) == ("from" in raw):
            raise self._fault(name, None, "expected either `model` or `from`")
        if "from" in raw:
            builds = self.document.data["builds"]
            if raw["from"] not in builds:
                raise self._fault(name, "from", f"no build {raw['from']!r}. {did_you_mean(raw['from'], builds)}")
            return self.build(raw["from"])
        return [self._model(name, model) for model in _listed(raw["model"])]

    def _model(self, build: str, name: str) -> Job:
        source = self.models.get(name)
        if source is None and name not in self.known:
            near = did_you_mean(name, self.models.keys() | self.known)
            raise self._fault(build, "model", f"no model {name!r} in the registry or the catalog. {near}")
        licence = source.licence if source else None
        place = self._place(build, "model")
        job = Job(name, ORIGINAL, place, source=source, registry=self.document.file, licence=licence)
        return self.jobs.setdefault(job.ref, job)

    def _job(self, build: str, raw: Any, parent: Job, recipe: str) -> Job:
        if recipe not in self.recipes:
            raise self._fault(build, "recipe", f"no recipe {recipe!r}. {did_you_mean(recipe, self.recipes)}")
        for gate in _listed(raw.get("gate", [])):
            if gate not in self.gates:
                raise self._fault(build, "gate", f"no gate {gate!r}. {did_you_mean(gate, self.gates)}")
        target, options, calibrate = _recipe(recipe, *self.recipes[recipe])
        job = Job(
            parent.name,
            raw.get("tag", recipe),
            self._place(build, "recipe"),
            (build,),
            parent=parent.ref,
            recipe_name=recipe,
            target=target,
            options=options,
            calibrate=calibrate,
            gates=tuple(self.gates[gate] for gate in _listed(raw.get("gate", []))),
            aliases=tuple(_listed(raw.get("alias", []))),
            licence=parent.licence,
        )
        other = self.jobs.setdefault(job.ref, job)
        if other is not job:
            hint = f"The other stands at {other.place}. Give one a `tag` of its own."
            raise UsageError(f"{build}: {job.ref} is made by {other.builds[0]} already", path=job.place, hint=hint)
        return job

    def _place(self, build: str, key: str | None) -> str:
        return self.document.place(("builds", build, key) if key else ("builds", build))

    def _fault(self, build: str, key: str | None, message: str) -> UsageError:
        return UsageError(f"{build}: {message}".rstrip(), path=self._place(build, key))


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _beside(document: Document, path: tuple[str, ...], name: str) -> Path:
    """The existing file `name`, as seen from the registry's folder."""
    file = document.file.absolute().parent / Path(name).expanduser()
    if not file.is_file():
        raise NotFoundError(f"{'.'.join(path[-2:])}: no such file: {file}", path=document.place(path))
    return file


def _gate(name: str, raw: Any, document: Document) -> Gate:
    values = {key: value for key, value in raw.items() if key != "note"}
    if "text" in values:
        values["text"] = _beside(document, ("gates", name, "text"), values["text"])
    if "max_bytes" in values:
        values["max_bytes"] = parse_size(values["max_bytes"])
    if "licences" in values:
        values["licences"] = tuple(values["licences"])
    return Gate(name, **values)


def _recipe(name: str, raw: Any, document: Document) -> tuple[jobs.Target, jobs.Options, Calibrate | None]:
    """The target, options and calibration text of a recipe; raises UsageError with the line of what does not fit."""

    def fault(key: str, message: str) -> UsageError:
        return UsageError(f"{name}: {message}", path=document.place(("recipes", name, key)))

    try:
        target = jobs.Target.parse(raw["target"])
    except UsageError as error:
        raise fault("target", f"{error.message}. {error.hint}") from error
    types = [(pattern, kind.upper()) for pattern, kind in raw.get("tensor_types", {}).items()]
    for key in ("output_type", "embedding_type"):
        types += [(key, raw[key].upper())] if key in raw else []
    for key, kind in types:
        if kind not in BLOCKS:
            raise fault(key if key in raw else "tensor_types", f"unknown type {kind!r}. {did_you_mean(kind, BLOCKS)}")
    calibrate = _calibrate(name, raw, document)
    if calibrate is None:
        if target.container in PACKED:
            raise fault("target", f"{target.container} needs a text to calibrate on: `calibrate: FILE`")
        if idle := [key for key in ("field", *_SETTINGS) if key in raw]:
            raise fault(idle[0], f"{idle[0]} does nothing without `calibrate`")
    elif "imatrix" in raw:
        raise fault("imatrix", "imatrix and calibrate exclude each other")
    options = jobs.Options(
        pre=raw.get("pre"),
        split_bytes=parse_size(raw["split"]) if "split" in raw else None,
        strict=raw.get("strict", False),
        imatrix=_beside(document, ("recipes", name, "imatrix"), raw["imatrix"]) if "imatrix" in raw else None,
        effort=raw.get("effort", "normal"),
        allow_pickle=raw.get("allow_pickle", False),
        overwrite=True,
        recipe=Recipe(
            pure=raw.get("pure", False),
            overrides=tuple((pattern, kind.upper()) for pattern, kind in raw.get("tensor_types", {}).items()),
            output_type=raw["output_type"].upper() if "output_type" in raw else None,
            embedding_type=raw["embedding_type"].upper() if "embedding_type" in raw else None,
        ),
    )
    return target, options, calibrate


def _calibrate(name: str, raw: Any, document: Document) -> Calibrate | None:
    if "calibrate" not in raw:
        return None
    named, path = raw["calibrate"], ("recipes", name, "calibrate")
    if named.startswith(dataset.PREFIX):
        if not COMMIT.fullmatch(named.partition("@")[2].partition("/")[0]):
            message = f"{name}: a dataset is pinned to a commit, as hf://datasets/ORG/NAME@COMMIT/FILE"
            raise UsageError(message, path=document.place(path))
    elif named != texts.SELF:
        named = str(_beside(document, path, named))
    return Calibrate(named, raw.get("field"), tuple((key, raw[key]) for key in _SETTINGS if key in raw))
