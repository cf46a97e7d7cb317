"""What is compared with what: the folds, the models and seeds, and how one model is fitted and predicts in one fold."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from hifusion import files
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort, SectionView, mean_profile
from hifusion.configuration import Recipe
from hifusion.costs import network_costs, peak_memory_mib
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.inference import SpotOutputs, best_device, fast_network, forward_batches
from hifusion.neighbour_section import fit_neighbour_section, predict_left_out
from hifusion.prediction import predict_all, run_surroundings
from hifusion.protocols import Fold, Protocol, check_leak, protocol
from hifusion.recipes import NETWORKS
from hifusion.simple_models import SIMPLE, Rival, simple_models
from hifusion.surroundings import Spots, Surroundings
from hifusion.training import check_patches, fit, shuffled, split

Progress = Callable[[str, int, int], None]
Say = Callable[[SectionView], SpotOutputs]
SHUFFLED = "shuffled"  # the first network once more, trained on targets dealt out anew over the spots
TEST_EPOCH = "_test_epoch"  # the network once more, its epoch selected on the tested sections: the published habit
REGISTERED = "_registered"  # the network, blended with what the patient's registered measured sections say
ENDINGS = {
    "": "network",
    TEST_EPOCH: "network, its epoch selected on the tested sections",
    REGISTERED: "network, blended with `neighbour_section`",
}
"""What a network's name may end with, and what it then is."""
SAME_PATIENT = ("neighbour_section", "asign3d")
"""Models that carry the expression of a measured section over to another one of the same patient."""

NULLS = (*SIMPLE, SHUFFLED)
CONTENDERS = (*NETWORKS, *NULLS)


class Job(NamedTuple):
    """One model to fit in every fold."""

    model: str
    seed: int | None
    """None for models without random choices."""

    @property
    def label(self) -> str:
        """Folder and column name."""
        return self.model if self.seed is None else f"{self.model}-seed{self.seed}"

    @property
    def network(self) -> str:
        """Name of the recipe of a network: the model's own, less its ending."""
        return self.model.removesuffix(TEST_EPOCH).removesuffix(REGISTERED)

    @property
    def run_label(self) -> str:
        """Folder of the network's run, which a blend shares with the network itself."""
        return Job(self.model.removesuffix(REGISTERED), self.seed).label

    @property
    def selects_on_test(self) -> bool:
        """Whether the epoch is selected on the tested sections, as the field's published figures are."""
        return self.model.endswith(TEST_EPOCH)


class FoldData(NamedTuple):
    """The sections of one fold through its panel."""

    panel: GenePanel
    fitted_on: list[SectionView]
    tested: list[SectionView]
    train_mean: np.ndarray


class Predicted(NamedTuple):
    """What one model says of the tested sections of a fold, and what a network cost."""

    sections: dict[str, np.ndarray]
    """Section -> float32 ``(N, G)``."""
    costs: dict[str, float]
    intervals: Mapping[str, tuple[np.ndarray, np.ndarray]] = {}
    """Section -> lower and upper ends of the 90 % intervals, ``(N, G)`` each; empty for models without."""
    novelty: Mapping[str, np.ndarray] = {}
    """Section -> float32 ``(N,)``, how unlike the training spots each spot is; empty for models without."""


@dataclass(frozen=True)
class Contest:
    """Models against each other over the folds of a protocol.

    Attributes
    ----------
    cohort
        A store, or a raw folder for models that look at counts only.
    protocol_name, rule, folds
        How sections are split.
    base
        Panel, normalisation and frozen encoder for all.
    recipes
        Network -> how it is trained; ``base`` decides panel and normalisation.
    jobs
        Models and seeds, nulls first.
    sections, not_run
        Names that folds are made of; models that cannot run, with the reason.
    """

    cohort: Cohort
    protocol_name: str
    rule: Protocol
    folds: list[Fold]
    base: Recipe
    recipes: dict[str, Recipe]
    jobs: list[Job]
    sections: list[str]
    not_run: dict[str, str]
    leak_check: bool
    _panels: dict[str, GenePanel] = field(default_factory=dict, repr=False)
    _fold_data: dict[str, FoldData] = field(default_factory=dict, repr=False)

    @classmethod
    def plan(
        cls,
        cohort: Cohort,
        protocol_name: str,
        models: Sequence[str],
        recipes: Mapping[str, Recipe],
        *,
        base: Recipe,
        seeds: Sequence[int] = (0,),
        with_nulls: bool = True,
        with_shuffled: bool = True,
        with_test_epoch: bool = False,
        with_registered: bool = False,
        leak_check: bool = True,
    ) -> "Contest":
        """Make folds and jobs, and refuse what cannot run or leaks before anything is trained.

        Parameters
        ----------
        models
            Names in ``recipes``, in :data:`SIMPLE`, or ``"shuffled"``, the null of the first network.
        with_nulls, with_shuffled
            Add every null and simple rival that the data allow; train the ``shuffled`` null too.
        with_test_epoch
            Train every network once more with its epoch selected on the tested sections, under its name with
            ``_test_epoch``: what the published habit is worth.
        with_registered
            Score HiFusion once more, as ``hifusion_registered``: its prediction ``n`` is drawn towards the ``k`` of
            ``neighbour_section``, ``n + w (k - n)``, by the share ``w`` that fits the validation spots best.

        Raises
        ------
        InputError
            Unknown model or protocol, no section with the images a model needs, or a fold that leaks.
        """
        unknown = [name for name in models if name not in recipes and name not in NULLS]
        if unknown or not models:
            raise InputError(f"model {', '.join(unknown) or '(none)'} is unknown; use {', '.join(CONTENDERS)}")
        rule = protocol(protocol_name)
        simple = simple_models(base.encoder)
        names, not_run = _usable_sections(cohort, models, simple)
        not_run |= _not_possible(rule, simple)
        recipes = {name: its for name, its in recipes.items() if name not in not_run}
        asked = _asked(models, recipes, with_nulls, with_shuffled, with_test_epoch, with_registered)
        not_run = {name: reason for name, reason in not_run.items() if name in (*asked, *models)}
        if recipes and SHUFFLED not in asked:
            not_run[SHUFFLED] = "switched off by the user"
        folds = rule.folds([info for info in cohort.infos if info.name in names])

        def alike(recipe: Recipe) -> Recipe:
            return replace(recipe, panel=base.panel, panel_size=base.panel_size, normalisation=base.normalisation)

        contest = cls(
            cohort,
            protocol_name,
            rule,
            folds,
            base,
            {name: alike(recipe) for name, recipe in recipes.items()},
            [Job(name, seed) for name in asked if name not in not_run for seed in _seeds_of(name, seeds)],
            sorted(names),
            not_run,
            leak_check,
        )
        for job in contest.jobs:
            if job.seed is not None:
                check_patches(contest.recipe_of(job), cohort.store)
        for fold in folds:
            contest.panel_of(fold)
        for fold in folds if leak_check else ():
            infos = [info for info in cohort.infos if info.name in names]
            check_leak(fold, infos, contest.digests, rule.same_patient)
        return contest

    def recipe_of(self, job: Job) -> Recipe:
        """How a network is trained; the ``shuffled`` null as the first network."""
        if job.model == SHUFFLED:
            return next(iter(self.recipes.values()), self.base)
        return self.recipes[job.network]

    def panel_of(self, fold: Fold) -> GenePanel:
        """The genes of a fold, chosen on training and validation sections unless the recipe says otherwise."""
        if fold.name not in self._panels:
            rule, size = self.base.panel, self.base.panel_size
            self._panels[fold.name] = self.cohort.panel(rule, size, fold.outside_test, fold.test)
        return self._panels[fold.name]

    def data_of(self, fold: Fold) -> FoldData:
        """The sections of a fold through its panel."""
        if fold.name not in self._fold_data:
            panel = self.panel_of(fold)
            fitted_on, tested = (
                self.cohort.views(names, panel, self.base.normalisation) for names in (fold.outside_test, fold.test)
            )
            self._fold_data[fold.name] = FoldData(panel, fitted_on, tested, mean_profile(fitted_on))
        return self._fold_data[fold.name]

    def key(self, job: Job, fold: Fold) -> str:
        """Digest of all that decides a job's result: recipe, seed, panel, and the fold's sections by content."""
        names = (*fold.outside_test, *fold.test)
        digests = {what: [of.get(name) for name in names] for what, of in self.digests.items()}
        places = [self.cohort.sections[name].obsm["spatial"] for name in names]
        digests["places"] = [files.digest(np.ascontiguousarray(its).data) for its in places]
        recipe = asdict(self.base if job.seed is None else self.recipe_of(job))
        facts = [job, recipe, asdict(fold), self.panel_of(fold).digest, digests]
        return files.digest(json.dumps(facts).encode())[:16]

    @cached_property
    def digests(self) -> dict[str, dict[str, str]]:
        """Of the cohort, computed once."""
        return self.cohort.digests

    def run(self, job: Job, fold: Fold, out: Path | None, progress: Progress | None = None) -> Predicted:
        """Fit one model in one fold and predict the tested sections, once.

        Parameters
        ----------
        out
            Folder in which the run of a network is kept and gone on with.
        """
        its = self.data_of(fold)
        if job.seed is None:  # takes seconds, and shares its process and its statistics with others: no costs
            predict = simple_models(self.base.encoder)[job.model].baseline.fit(its.fitted_on)
            return Predicted({view.name: predict(view) for view in its.tested}, {})
        assert out is not None
        say, run, costs = self._network(job, fold, its, out, progress)
        started = time.perf_counter()
        said = {view.name: say(view) for view in its.tested}
        spots = sum(len(outputs.expression) for outputs in said.values())
        costs["predict_spots_per_s"] = spots / (time.perf_counter() - started)
        distance = run.novelty
        return Predicted(
            {name: outputs.expression for name, outputs in said.items()},
            costs | {"peak_memory_mib": peak_memory_mib()},
            {name: (o.lower, o.upper) for name, o in said.items() if o.lower is not None and o.upper is not None},
            {name: distance.of(outputs.embedding) for name, outputs in said.items()} if distance else {},
        )

    def parts(self, job: Job, fold: Fold) -> tuple[list[SectionView], list[SectionView]]:
        """Training and validation sections of a network; validation is empty where blocks of spots are held out."""
        its = self.data_of(fold)
        if job.selects_on_test:
            return its.fitted_on, its.tested
        by_name = {view.name: view for view in its.fitted_on}
        return [by_name[name] for name in fold.train], [by_name[name] for name in fold.validation]

    def _network(
        self, job: Job, fold: Fold, its: FoldData, out: Path, progress: Progress | None
    ) -> tuple[Say, Run, dict[str, float]]:
        recipe, seed = self.recipe_of(job), job.seed
        assert seed is not None
        train, validation = self.parts(job, fold)
        if job.selects_on_test:
            recipe = replace(recipe, selection="validation")
        run = fit(
            recipe,
            its.panel,
            train,
            validation,
            out / "runs" / fold.name / job.run_label,
            store=self.cohort.store,
            seed=seed,
            shuffle_targets=job.model == SHUFFLED,
            resume=True,
            progress=progress and (lambda what, done, total: progress(f"{fold.name} {job.label} {what}", done, total)),
        )
        if job.model == SHUFFLED:  # what networks look up of training spots is what they were trained on
            train, validation = shuffled(train, seed), shuffled(validation, seed)
        trained, held_out = split(recipe, train, validation, seed)
        network, surroundings = run.network(best_device()), run_surroundings(run, trained)
        seconds = run.facts["train_seconds"]
        costs = {
            **_forward_costs(network, surroundings, its.tested[0]),
            "train_seconds": seconds,
            "train_spots_per_s": run.facts["train_spots"] * recipe.epochs / seconds,
        }

        precision = run.facts["precision"]
        fast = fast_network(network, precision)

        def say(view: SectionView) -> SpotOutputs:
            return predict_all(fast, surroundings, view, precision, progress)

        blended = _registered(say, its.fitted_on, held_out) if job.model.endswith(REGISTERED) else say
        return blended, run, costs


def _registered(network: Say, fitted_on: Sequence[SectionView], held_out: Sequence[Spots]) -> Say:
    """A network drawn towards what the patient's registered measured sections say (``Contest.plan``)."""
    said = dict(zip((view.name for view in fitted_on), predict_left_out(fitted_on), strict=True))
    along = length = 0.0
    for view, rows in held_out:
        own = network(view).expression[rows].astype(np.float64)
        towards = said[view.name][rows] - own
        along += float(((view.expression[rows] - own) * towards).sum())
        length += float(np.square(towards).sum())
    share = min(max(along / length, 0.0), 1.0) if length else 0.0
    neighbours = fit_neighbour_section(fitted_on)

    def say(view: SectionView) -> SpotOutputs:
        own = network(view)
        blended = own.expression + share * (neighbours(view) - own.expression)
        return SpotOutputs(blended.astype(np.float32), own.embedding)

    return say


def _forward_costs(network: nn.Module, surroundings: Surroundings, view: SectionView) -> dict[str, float]:
    """Parameters and operations of a network, by one forward pass over a few spots or a whole section."""
    region, inputs = surroundings.sample(view)
    return network_costs(
        lambda: next(forward_batches(network, [(region, inputs)], precision="32-true")), network, len(region)
    )


def _usable_sections(
    cohort: Cohort, models: Sequence[str], simple: Mapping[str, Rival]
) -> tuple[list[str], dict[str, str]]:
    """Sections to make folds of, and the rivals that cannot run on them, with the reason."""
    needs_images = [name for name in models if name not in simple or simple[name].baseline.needs_images]
    with_image = [name for name in cohort.sections if cohort.has_regions(name)]
    if needs_images:
        if not with_image:
            raise InputError(
                f"{cohort.root}: {', '.join(needs_images)} needs region patches and there are none; build a store with "
                "`hifusion prepare` and give that as --data"
            )
        return with_image, {}
    if len(with_image) == len(cohort.sections):
        return list(cohort.sections), {}
    without = "counts only: not every section has region patches"
    return list(cohort.sections), {name: without for name, its in simple.items() if its.baseline.needs_images}


def _not_possible(rule: Protocol, simple: Mapping[str, Rival]) -> dict[str, str]:
    """Models that the protocol or the installation rules out, with the reason."""
    found = {name: its.lacks for name, its in simple.items() if its.lacks}
    if not rule.same_patient:
        reason = "no section of the tested patient is measured in this protocol"
        found |= {f"{name}{ending}": reason for name in SAME_PATIENT for ending in ENDINGS}
        found[f"hifusion{REGISTERED}"] = reason
    return found


def _asked(
    models: Sequence[str],
    recipes: Mapping[str, Recipe],
    with_nulls: bool,
    with_shuffled: bool,
    with_test_epoch: bool,
    with_registered: bool,
) -> list[str]:
    """Names of all that is to be scored: nulls first, then networks, then networks in another way."""
    networks = [name for name in dict.fromkeys(models) if name in recipes]
    wanted = {*models, *(SIMPLE if with_nulls else ())}
    if networks and with_nulls and with_shuffled:
        wanted.add(SHUFFLED)
    more = [f"{name}{TEST_EPOCH}" for name in networks if with_test_epoch]
    more += [f"{name}{REGISTERED}" for name in networks if with_registered and name == "hifusion"]
    return [*(name for name in NULLS if name in wanted), *networks, *more]


def _seeds_of(model: str, seeds: Sequence[int]) -> Sequence[int | None]:
    # The shuffled null is trained with the first seed only: it is there to show zero, at the cost of a whole training.
    return [None] if model in SIMPLE else seeds[:1] if model == SHUFFLED else seeds
