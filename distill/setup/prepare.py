"""Setup of a run: a recipe's sources, stores and targets, opened and checked."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.data import batches, epoch_order, open_source, view_fingerprint
from coursepack.data.batches import join
from coursepack.data.loading import device_images
from coursepack.data.randomness import Purpose, shuffled
from coursepack.data.sources import subset
from coursepack.data.store.locations import absolute_address
from coursepack.distill.distributed import SINGLE_RANK
from coursepack.distill.setup.build import build_objective, build_student, read_arrays
from coursepack.distill.setup.checks import (
    check_evaluation,
    check_ranks,
    check_recipe,
    check_student,
    check_views,
    fewest_rows,
)
from coursepack.distill.setup.requirements import check_needs
from coursepack.distill.setup.wrap import wrapped_student
from coursepack.distill.targets.live import OnlineTargets, live_teachers
from coursepack.distill.targets.reading import free_memory
from coursepack.distill.targets.teacher_stores import open_targets, open_teacher_stores
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from coursepack.data import Batch, Source
    from coursepack.data.batches import Window
    from coursepack.data.randomness import Samples
    from coursepack.data.store import StoreReader
    from coursepack.distill.distributed import Ranks
    from coursepack.distill.objective import Objective
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.targets.base import TargetSource
    from coursepack.distill.targets.stores import CachedTargets
    from coursepack.models import Network


@dataclass(frozen=True)
class Setup:
    """Recipe with its opened and checked sources, stores and targets."""

    recipe: TrainRecipe
    source: Source
    evaluation: Source
    samples: Samples
    views: tuple[int, ...] | None
    """Views, used in turn; None means a new view every epoch."""
    targets: TargetSource | None
    readers: tuple[StoreReader, ...]
    window: Window | None
    """Window within which samples are shuffled if the stores do not fit into memory."""
    device: torch.device
    drift: tuple[str, ...] = ()
    """Drift detected in the stores' views and accepted with `--allow-drift`."""
    images: torch.Tensor | None = None
    """Images of the source on the device, if views are rendered there."""
    ranks: Ranks = SINGLE_RANK
    """Rank of this process."""
    trust_code: bool = False
    """True if runs and stores may name Python code for networks."""
    divided: tuple[Samples, ...] = ()
    """Disjoint shares of the samples, one for each student that reads rows of its own; empty if none does."""

    @property
    def shares(self) -> int:
        """Number of students that read rows of their own, or 1 for all students that read the same ones."""
        return max(1, len(self.divided))

    @property
    def samples_per_step(self) -> int:
        """Number of samples of a full batch."""
        return self.shares * (self.recipe.batch_size // self.recipe.views_per_load)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches per epoch."""
        return -(-len(self.samples) // self.samples_per_step)

    def views_of_epoch(self, epoch: int) -> list[int]:
        """Return the views of each sample in an epoch."""
        each = self.recipe.views_per_load
        return [self._view(turn) for turn in range(epoch * each, (epoch + 1) * each)]

    def _view(self, turn: int) -> int:
        if self.views is None:
            return turn
        time_round, index = divmod(turn, len(self.views))
        if self.recipe.view_order == "cyclic":
            return self.views[index]
        views = np.array(self.views, dtype=np.int64)
        return int(shuffled(views, self.recipe.seed, time_round, Purpose.VIEW_ORDER)[index])

    def batches(
        self, epoch: int, first: int = 0, teachers: Callable[[int], Sequence[int] | None] = lambda _: None
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch `first` on, and prefetch the targets that follow.

        With several ranks, each gets its share of every batch. A last batch with fewer than two rows per rank
        is not divided; every rank processes it whole. Students that read rows of their own get `batch_size`
        rows each.

        Args:
            epoch: index of the epoch.
            first: index of the first batch.
            teachers: returns the indices of the teachers that an epoch reads; None means all.
        """
        views = self.views_of_epoch(epoch)
        orders = [
            epoch_order(samples, seed=self.recipe.seed, epoch=epoch, window=self.window)
            for samples in self.divided or (self.samples,)
        ]
        order = orders[0] if len(orders) == 1 else np.stack(orders, 1).ravel()
        begin = done = announced = first * self.samples_per_step
        by_share = (
            batches(
                self.source,
                self.recipe.view,
                own,
                views=views,
                batch_size=self.recipe.batch_size,
                device=self.device,
                images=self.images,
                first=first,
                part=self.ranks.part,
            )
            for own in orders
        )
        for batch in map(join, zip(*by_share, strict=True)):
            whole = batch.global_batch or batch
            if self.targets is not None and self.window is not None and done >= announced:
                announced = done + self.window.rows
                for view in views:
                    self.targets.will_need(
                        view, order[announced : announced + self.window.rows], teachers(epoch)
                    )
            if self.targets is not None and done == begin:
                # First, so that it never waits for the download of the next ones.
                for view in views:
                    self.targets.open(view, teachers(epoch))
                for view in self.views_of_epoch(epoch + 1):
                    self.targets.prefetch(view, teachers(epoch + 1))
            yield whole if len(whole) < fewest_rows(self.ranks) else batch
            done += len(whole) // len(views)

    def sizes(self, students: Sequence[Network]) -> list[int]:
        """Return the image sizes in pixels at which students and live teachers need the views."""
        sizes = {student.preprocessing.size for student in students}
        if isinstance(self.targets, OnlineTargets):
            sizes |= {runner.network.preprocessing.size for runner in self.targets.runners}
        return sorted(sizes)

    def student(self, recipe: TrainRecipe) -> Network:
        """Build the network that a recipe trains: its initialized student, wrapped if a term wraps it.

        Raises:
            UnknownName, RecipeError: the student cannot be built or wrapped, or does not accept the source's
                images.
        """
        student = wrapped_student(
            recipe.objective,
            build_student(recipe, self.source, trust_code=self.trust_code),
            self.source,
            self.readers,
            method=recipe.method,
            root=recipe.root,
            seed=recipe.own_seed,
        )
        check_student(student, self.source)
        if recipe.channels_last:
            student.module.to(memory_format=torch.channels_last)
        return student

    def objective(self, recipe: TrainRecipe, student: Network) -> Objective:
        """Build a recipe's objective for a student and this setup's teachers."""
        return build_objective(
            recipe.objective,
            student,
            self.source,
            self.readers,
            method=recipe.method,
            root=recipe.root,
            seed=recipe.own_seed,
            samples=self.samples,
            epochs=recipe.epochs,
        )


def prepare(
    recipe: TrainRecipe,
    device: torch.device,
    ranks: Ranks = SINGLE_RANK,
    others: Sequence[TrainRecipe] = (),
    *,
    trust_code: bool = False,
) -> Setup:
    """Open the sources and stores of a recipe, and check that it can be trained.

    All ranks read their stores in the same way, chosen to fit the memory of every rank.

    Args:
        recipe: the recipe.
        device: device to train on.
        ranks: rank of this process.
        others: recipes of further students that train on the same batches and stores.
        trust_code: allow stores to name Python code for live teachers.

    Raises:
        UntrustedCode: a store names Python code for its teacher, and `trust_code` is false.
        StoreMismatch: stores have different views or sources, or another source than the recipe.
        StoreNotFound, StoreIncomplete, StoreDamaged: a store cannot be read.
        SourceError: files of a source are missing or damaged.
        RecipeError, UnknownName: fields do not fit together, or a name is unknown.
    """
    if recipe.stores:
        recipe = recipe.model_copy(update={"view": recipe.view.located(recipe.stores[0])})
    root = None if recipe.root is None else Path(recipe.root)
    source, evaluation = open_source(recipe.source, root), open_source(recipe.evaluation, root)
    source.check()
    evaluation.check()
    check_evaluation(source, evaluation)
    for each in (recipe, *others):
        check_recipe(each)
        check_ranks(each, ranks)
    recipes = [member for each in (recipe, *others) for member in each.members()]
    views = None if recipe.views is None else tuple(range(recipe.views))
    cached = _cached_targets(recipe, recipes, source, device, ranks, trust_code) if recipe.stores else None
    if cached is not None:
        views = cached.views
    if views is not None:
        check_views(recipe, views)
    targets: TargetSource | None = cached
    if recipe.online:
        if cached is None:
            raise RecipeError("--online runs the teachers of stores live: give at least one --store")
        targets = OnlineTargets(live_teachers(cached.readers, cached.arrays, device, trust_code=trust_code))
    samples, divided = _samples(recipe, source)
    return Setup(
        recipe,
        source,
        evaluation,
        samples,
        views,
        targets,
        () if cached is None else tuple(cached.readers),
        None if cached is None else cached.window,
        device,
        () if cached is None else cached.drift,
        device_images(source, recipe.view, device),
        ranks,
        trust_code,
        divided,
    )


def _samples(recipe: TrainRecipe, source: Source) -> tuple[Samples, tuple[Samples, ...]]:
    """Return the samples that a recipe trains on, and their division among students in this process.

    Of N shares, each is every N-th sample in the order of classes and indices: classes are as even in a share
    as in all samples. All shares have the same size, so up to N - 1 samples are left out.
    """
    samples, count = subset(source, recipe.limit), recipe.shares
    if len(samples) < count:
        raise RecipeError(
            f"{len(samples)} samples cannot be divided among {count} students: give a larger --limit, or "
            "--set objective.exchange.rows=shared"
        )
    if count == 1:
        return samples, ()
    by_class = samples[np.argsort(source.labels[samples], kind="stable")]
    even = by_class[: len(samples) // count * count]
    shares = tuple(np.sort(even[index::count]) for index in range(count))
    return (shares[recipe.member], ()) if recipe.replicas else (np.sort(even), shares)


def _cached_targets(
    recipe: TrainRecipe,
    recipes: Sequence[TrainRecipe],
    source: Source,
    device: torch.device,
    ranks: Ranks,
    trust_code: bool,
) -> CachedTargets:
    """Open the arrays that any of the recipes reads, in the stores of `recipe`."""
    stores = open_teacher_stores(recipe.stores, source=source, view=recipe.view, root=recipe.root)
    arrays = []
    for each in recipes:
        check_needs(each.method, each.objective, stores.readers, each.view, each.root)
        arrays.append(read_arrays(each, source, stores.readers, trust_code=trust_code))
    free = min(ranks.all_gather(free_memory() // ranks.local_count)) if recipe.reading == "auto" else None
    return open_targets(
        stores,
        [list(dict.fromkeys(itertools.chain(*of_store))) for of_store in zip(*arrays, strict=True)],
        views=recipe.views,
        device=device,
        reading=recipe.reading,
        allow_drift=recipe.allow_drift,
        free_bytes=free,
    )


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a student depends on, by name."""
    return {name: version(name) for name in ("coursepack", "torch", "torchvision", "numpy")}


def provenance(setup: Setup) -> dict[str, Any]:
    """Return a run's provenance: fingerprints of its data, class names, library versions and device."""
    stores = [
        {
            "path": absolute_address(reader.address),
            "fingerprint": reader.manifest.fingerprint,
            "views": list(reader.views),
            "reading": reader.reading,
            "encoding": reader.manifest.arrays["logits"].encoding.to_dict(),
        }
        for reader in setup.readers
    ]
    return {
        "stores": stores,
        "view_fingerprint": view_fingerprint(setup.recipe.view, setup.source),
        "source_fingerprint": setup.source.fingerprint,
        "class_names": list(setup.source.class_names),
        "whole_images": setup.evaluation.in_memory is not None,
        "versions": library_versions(),
        "device": str(setup.device),
        "ranks": setup.ranks.count,
        "drift": list(setup.drift),
        "views": None if setup.views is None else list(setup.views),
        "window": None if setup.window is None else asdict(setup.window),
    }


def describe_setup(setup: Setup) -> str:
    """Return the line that a run prints before its first step."""
    recipe = setup.recipe
    teachers = ", ".join(reader.name for reader in setup.readers)
    students = " and ".join((recipe.student, *recipe.peers))
    text = f"{students} on {len(setup.samples):,} samples of {setup.source.name}, method {recipe.method}"
    if setup.shares > 1:
        text += f", {len(setup.samples) // setup.shares:,} samples for each of {setup.shares} students"
    if recipe.replicas:
        text += f", replica {recipe.member + 1} of {recipe.replicas}"
    if setup.readers:
        how = "live" if recipe.online else f"from their stores ({setup.readers[0].reading})"
        text += f", teachers {teachers} {how}"
    if setup.views is None:
        return f"{text}; a new view every epoch"
    each = recipe.views_per_load
    round_trip = -(-len(setup.views) // each)
    order, again = {
        "cyclic": ("in turn", "in the same order"),
        "shuffled": ("in random order", "in another order"),
    }[recipe.view_order]
    repeats = "" if recipe.epochs <= round_trip else f", all seen again {again} after {round_trip} epochs"
    per_epoch = "one" if each == 1 else f"{each} of every sample"
    return f"{text}; {len(setup.views)} views {order}, {per_epoch} per epoch{repeats}"
