"""Checks before the first step: recipe, views, sources, student and ranks must fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.losses import LOSSES
from coursepack.distill.schedule import Schedule
from coursepack.distill.setup.student import probe_student
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data import Source
    from coursepack.distill.distributed import Ranks
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.models import Network


def check_student(network: Network, source: Source) -> None:
    """Check that a student accepts the source's images and returns logits of its classes.

    Raises:
        RecipeError: it does not.
    """
    shape = probe_student(network, source.channels).logits
    if shape != (network.classes,):
        raise RecipeError(
            f"student {network.spec!r} gives logits of shape {(1, *shape)}, "
            f"expected {(1, network.classes)} (N, C)"
        )


def check_recipe(recipe: TrainRecipe) -> None:
    """Check that the fields of a recipe fit together.

    Raises:
        RecipeError: they do not; the message names the fields.
    """
    _check_mixing(recipe)
    _check_accumulation(recipe)
    _check_compile(recipe)
    _check_schedule(recipe)
    _check_phases(recipe)
    _check_replicas(recipe)
    _check_peers(recipe)
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
            "--store out, give the stores a share of the loss with --soft-weight 0.9, or choose a method "
            "that learns from them, as --method kd"
        )
    _check_fusion(recipe)
    if recipe.keep_checkpoints is not None and recipe.keep_checkpoints > recipe.epochs:
        raise RecipeError(
            f"keep_checkpoints is {recipe.keep_checkpoints}, but the run has {recipe.epochs} epochs, so none "
            f"would be kept: give --keep-checkpoints {recipe.epochs} or less"
        )


def _check_fusion(recipe: TrainRecipe) -> None:
    """Refuse a fusion that does not fit the number of stores, or the epochs of the run."""
    if not recipe.objective.needs().fused:
        return
    fusion, teachers = recipe.objective.fusion, len(recipe.stores)
    if refusal := fusion.refusal(teachers) or fusion.refusal_of_epochs(teachers, recipe.epochs):
        raise RecipeError(refusal)


def _check_mixing(recipe: TrainRecipe) -> None:
    """Refuse mixed images with a limit: partners come from the whole split, so their labels would leak."""
    objective = recipe.objective
    if recipe.view.mix is None or recipe.limit is None or not objective.needs().labels:
        return
    without = objective.model_copy(update={"hard_weight": 0.0}).needs()
    enough = without.teachers and not without.labels
    instead = "--hard-weight 0" if enough else "a method that reads no labels"
    raise RecipeError(
        f"limit is {recipe.limit}, but the view mixes in samples of the whole split, whose labels would "
        f"be learned too: give {instead}, a view without mix, or leave --limit out"
    )


def _check_accumulation(recipe: TrainRecipe) -> None:
    """Refuse gradient accumulation if the loss couples the samples of a batch."""
    coupled = recipe.objective.needs().whole_batch
    if recipe.accumulate > 1 and coupled:
        raise RecipeError(
            f"accumulate is {recipe.accumulate}, but method {recipe.method!r} relates all samples of a batch "
            f"({', '.join(coupled)}): leave accumulate out, or choose a smaller batch_size"
        )
    if recipe.accumulate > recipe.batch_size:
        raise RecipeError(
            f"accumulate is {recipe.accumulate}, but batch_size is {recipe.batch_size}: a micro-batch needs "
            "at least one sample"
        )


def _check_compile(recipe: TrainRecipe) -> None:
    """Refuse to compile a student whose layers are watched: compiled modules skip forward hooks."""
    inside = recipe.objective.needs().inside_student
    if recipe.compile and inside:
        raise RecipeError(
            f"compile is set, but method {recipe.method!r} reads layers of the student "
            f"({', '.join(inside)}), which torch.compile does not support: leave compile out"
        )


def _check_replicas(recipe: TrainRecipe) -> None:
    """Refuse replicas without a group to exchange weights in, with another method, or with peers."""
    if recipe.replicas is None:
        if recipe.group is not None:
            raise RecipeError(
                f"--group {recipe.group} is where replicas exchange weights, but this run is none: give "
                "--replica I/N, such as 1/3, or leave --group out"
            )
        return
    replica = f"--replica {recipe.member + 1}/{recipe.replicas}"
    if recipe.member >= recipe.replicas:
        raise RecipeError(f"{replica}: there are only {recipe.replicas} replicas")
    if recipe.group is None:
        raise RecipeError(
            f"{replica} exchanges weights with the others through a folder or bucket: give --group DIR, or "
            "--group s3://BUCKET/PATH"
        )
    if recipe.peers:
        raise RecipeError(
            f"{replica} trains one student, but {1 + len(recipe.peers)} are given: leave --peers out, or "
            "train all students in one process, without --replica"
        )
    name = recipe.objective.exchange.name
    if EXCHANGES[name].build_replica is None or not recipe.objective.needs().peers:
        raise RecipeError(
            f"{replica} is for students that exchange weights, but method {recipe.method!r} does not: choose "
            "--method codistillation, or leave --replica out"
        )


def _check_peers(recipe: TrainRecipe) -> None:
    """Refuse a method for several students with one student, several with another method, or too many."""
    needs, count = recipe.objective.needs(), recipe.replicas or 1 + len(recipe.peers)
    if recipe.peers and not needs.peers:
        raise RecipeError(
            f"there are {count} students, but those of method {recipe.method!r} do not learn from each "
            "other: add the term that does it with --set objective.terms.mutual.weight=1, choose a method "
            "such as dml, or train them by `distill sweep`"
        )
    if not needs.peers:
        return
    config = recipe.objective.exchange
    fewest, most = EXCHANGES[config.name].students
    if not fewest <= count <= (count if most is None else most):
        expected = f"{fewest} or more" if most is None else f"{fewest} to {most}"
        raise RecipeError(
            f"method {recipe.method!r} trains students that learn from each other (exchange "
            f"{config.name!r}), expected {expected} of them, got {count}: repeat --student NAME, or give "
            "--peers N for N students of one network"
        )
    if needs.one_label and recipe.view.mix is not None and not recipe.stores:
        raise RecipeError(
            f"{needs.one_label} reads one label per sample, but the view mixes images, and a mixed image has "
            "two: use a view without mix, or another exchange target"
        )
    if needs.joint and recipe.precision == "float16":
        raise RecipeError(
            f"precision is float16, which scales the gradient of each student by itself, but {needs.joint}: "
            "choose bfloat16 or float32"
        )


def _check_schedule(recipe: TrainRecipe) -> None:
    """Refuse a learning-rate schedule whose milestones or warm-up lie past the end of the run."""
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


def _check_phases(recipe: TrainRecipe) -> None:
    """Refuse a run that ends in the first phase of a method, in which it trains something else."""
    objective, epochs = recipe.objective, recipe.epochs
    weights = {"soft_weight": objective.soft_weight, "hard_weight": objective.hard_weight}
    weights |= {f"terms.{key}.weight": term.weight for key, term in objective.terms.items()}
    phases = {
        f"objective.{name}.epochs": weight.epochs
        for name, weight in weights.items()
        if isinstance(weight, Schedule) and weight.shape == "step"
    }
    for key, term in objective.all_terms().items():
        for field in LOSSES[term.term].needs(term).first_epochs:
            phases[f"objective.terms.{key}.{field}"] = getattr(term, field)
    late = {name: phase for name, phase in phases.items() if phase >= epochs}
    if late:
        words = " ".join(f"--set {name}={max(1, epochs // 4)}" for name in late)
        raise RecipeError(
            f"the first phase of method {recipe.method!r} takes {max(late.values())} epochs, but the run has "
            f"{epochs}, so the next one would never begin: give at least {max(late.values()) + 1} --epochs"
            + (f", or a shorter phase, as {words}" if epochs > 1 else "")
        )


def check_evaluation(source: Source, evaluation: Source) -> None:
    """Check that training and evaluation data have the same number of classes and channels.

    Raises:
        RecipeError: they do not.
    """
    for kind, trained, evaluated in (
        ("classes", len(source.class_names), len(evaluation.class_names)),
        ("channels", source.channels, evaluation.channels),
    ):
        if trained != evaluated:
            raise RecipeError(
                f"evaluation {evaluation.name!r} has {evaluated} {kind}, but source {source.name!r} has "
                f"{trained}: evaluate on a split of the same data"
            )


def check_views(recipe: TrainRecipe, views: Sequence[int]) -> None:
    """Check that no epoch contains a view of a sample twice.

    Raises:
        RecipeError: an epoch would.
    """
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
    """Return the smallest batch that is divided among ranks: two rows per rank, for batch normalization."""
    return 2 * ranks.count if ranks.count > 1 else 1


def check_ranks(recipe: TrainRecipe, ranks: Ranks) -> None:
    """Check that a recipe can be trained on several ranks.

    Raises:
        RecipeError: it cannot.
    """
    if ranks.count == 1:
        return
    if recipe.batch_size < fewest_rows(ranks):
        raise RecipeError(
            f"batch_size is {recipe.batch_size}, but {ranks.count} ranks share a batch: give at least "
            f"{fewest_rows(ranks)}, two rows per rank"
        )
    if alone := recipe.objective.needs().one_process:
        raise RecipeError(
            f"method {recipe.method!r} cannot be trained on {ranks.count} ranks, since {alone}: train in one "
            "process, without torchrun"
        )
    coupled = recipe.objective.needs().whole_batch
    if coupled and recipe.online:
        raise RecipeError(
            f"method {recipe.method!r} relates all samples of a batch ({', '.join(coupled)}), so every rank "
            "needs the teachers' outputs for the whole batch, but live teachers run on one rank's rows: "
            "leave --online out, or train in one process"
        )
