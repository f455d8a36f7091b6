"""What is refused before the first step: recipes, stores, sources and students that do not fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.distill.schedule import is_used
from coursepack.distill.setup.student import probe_student
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data import Source
    from coursepack.distill.distributed import Ranks
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.models import Network


def check_student(network: Network, source: Source) -> None:
    """Refuse a student that cannot take the source's images, before the run."""
    shape = probe_student(network, source.channels).logits
    if shape != (network.classes,):
        raise RecipeError(
            f"student {network.spec!r} gives logits of shape {(1, *shape)}, "
            f"expected {(1, network.classes)} (N, C)"
        )


def check_recipe(recipe: TrainRecipe) -> None:
    """Refuse fields that do not fit together.

    Raises:
        RecipeError: the text names them.
    """
    _check_mixing(recipe)
    _check_parts(recipe)
    _check_compile(recipe)
    _check_schedule(recipe)
    if recipe.views_per_load > recipe.batch_size:
        raise RecipeError(
            f"views_per_load is {recipe.views_per_load}, but batch_size is {recipe.batch_size}: a batch has "
            "to hold every view of at least one sample"
        )
    needs_teachers = recipe.objective.needs().teachers
    if needs_teachers and not recipe.stores:
        raise RecipeError(f"method {recipe.method!r} needs teachers: give at least one --store")
    if recipe.stores and not needs_teachers:
        raise RecipeError(
            f"method {recipe.method!r} does not use teachers, but --store {recipe.stores[0]} is given: leave "
            "--store out, or choose a method that learns from them, as --method kd"
        )


def _check_mixing(recipe: TrainRecipe) -> None:
    """Partners come from the whole split: a student that may know few labels must not learn theirs."""
    objective = recipe.objective
    hard = not objective.needs().teachers or is_used(objective.hard_weight)
    if recipe.view.mix is not None and recipe.limit is not None and hard:
        raise RecipeError(
            f"limit is {recipe.limit}, but the view mixes in samples of the whole split, whose labels would "
            "be learned too: give --hard-weight 0 with teachers, a view without mix, or leave --limit out"
        )


def _check_parts(recipe: TrainRecipe) -> None:
    """Refuse to work a batch through in parts where its samples depend on each other."""
    coupled = recipe.objective.needs().whole_batch
    if recipe.accumulate > 1 and coupled:
        raise RecipeError(
            f"accumulate is {recipe.accumulate}, but method {recipe.method!r} relates all samples of a batch "
            f"({', '.join(coupled)}): leave accumulate out, or choose a smaller batch_size"
        )
    if recipe.accumulate > recipe.batch_size:
        raise RecipeError(
            f"accumulate is {recipe.accumulate}, but batch_size is {recipe.batch_size}: a part needs a sample"
        )


def _check_compile(recipe: TrainRecipe) -> None:
    """Refuse to compile a student whose layers are watched: a compiled one runs past the hooks."""
    inside = recipe.objective.needs().inside_student
    if recipe.compile and inside:
        raise RecipeError(
            f"compile is set, but method {recipe.method!r} looks inside the student ({', '.join(inside)}), "
            "which cannot be done through torch.compile: leave compile out"
        )


def _check_schedule(recipe: TrainRecipe) -> None:
    """Refuse a learning rate whose changes lie past the end of the run."""
    schedule, epochs = recipe.optimizer.schedule, recipe.epochs
    late = [milestone for milestone in schedule.milestones if milestone >= epochs]
    if late:
        raise RecipeError(
            f"optimizer.schedule.milestones are {list(schedule.milestones)}, but the run ends after epoch "
            f"{epochs - 1}, so the learning rate would never fall at {late[0]}: give --milestones below "
            f"{epochs}, or more --epochs"
        )
    if schedule.warmup_epochs > epochs:
        raise RecipeError(
            f"optimizer.schedule.warmup_epochs is {schedule.warmup_epochs:g}, but the run has {epochs} "
            f"epochs, so the learning rate would never reach lr: give --warmup-epochs up to {epochs}, or "
            "more --epochs"
        )


def check_evaluation(source: Source, evaluation: Source) -> None:
    """Refuse to evaluate on images or classes that the student is not trained on."""
    for what, trained, evaluated in (
        ("classes", len(source.class_names), len(evaluation.class_names)),
        ("channels", source.channels, evaluation.channels),
    ):
        if trained != evaluated:
            raise RecipeError(
                f"evaluation {evaluation.name!r} has {evaluated} {what}, but source {source.name!r} has "
                f"{trained}: evaluate on a split of the same data"
            )


def check_views(recipe: TrainRecipe, views: Sequence[int]) -> None:
    """Refuse an epoch that would hold a view of a sample twice."""
    each = recipe.views_per_load
    if each > len(views):
        raise RecipeError(
            f"views_per_load is {each}, but the run has {len(views)} views: a batch would hold a view of a "
            "sample twice"
        )
    if recipe.view_order == "shuffled" and len(views) % each:
        raise RecipeError(
            f"views_per_load is {each}, but the run has {len(views)} views in shuffled order: an epoch that "
            "ends one round and begins the next might hold a view of a sample twice. Give a number that "
            f"divides {len(views)}, or leave view_order out"
        )


def fewest_rows(ranks: Ranks) -> int:
    """Rows of a batch that is divided between ranks: two for each, which batch normalisation needs."""
    return 2 * ranks.count if ranks.count > 1 else 1


def check_ranks(recipe: TrainRecipe, ranks: Ranks) -> None:
    """Refuse what several ranks cannot do together."""
    if ranks.count == 1:
        return
    if recipe.batch_size < fewest_rows(ranks):
        raise RecipeError(
            f"batch_size is {recipe.batch_size}, but {ranks.count} ranks share a batch: give at least "
            f"{fewest_rows(ranks)}, two rows for each"
        )
    coupled = recipe.objective.needs().whole_batch
    if coupled and recipe.online:
        raise RecipeError(
            f"method {recipe.method!r} relates all samples of a batch ({', '.join(coupled)}), so every rank "
            "needs the teachers' answers to the whole batch, but live teachers see one rank's rows: leave "
            "--online out, or train in one process"
        )
