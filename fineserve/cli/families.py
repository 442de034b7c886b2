"""`fineserve pretrain`, `condense`, `calibrate` and the other commands about families.

What needs torch is imported when it is asked for.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fineserve.cli.options import FamilyConfig, FamilyDirectory, NewFamily, Work, fail
from registry.settings import get_settings

if TYPE_CHECKING:
    from learngenes.family.family import Family
    from worker.runtime import Runtime

cli = typer.Typer()


@cli.command()
def profile(
    family: Annotated[str | None, typer.Option(help="by default every calibrated one")] = None,
    reset: Annotated[
        bool, typer.Option(help="only forget what was observed of models; measure nothing")
    ] = False,
    memory: Annotated[
        bool, typer.Option(help="only what a process needs, whatever else the machine does")
    ] = False,
) -> None:
    """Measure this device, and keep the result in Redis for the solver; a minute a family.

    Workers do so by themselves when nobody asks for images.
    """
    import redis

    from learngenes.family.family import FamilyError
    from worker.build.profiles import forget_observations, refresh_memory
    from worker.runtime import Runtime

    try:
        runtime = Runtime.start(get_settings())
        runtime.announce_families()
        names = [family] if family else [n for n, f in runtime.families.items() if f.quality]
        for name in names:
            if reset:
                before = forget_observations(runtime, name)
                typer.echo(f"{name}: {before} observations are forgotten")
            elif memory:
                profile = refresh_memory(runtime, name)
                typer.echo(f"{name}: a process needs {profile.process_base_bytes / 1e9:.3f} GB")
            else:
                _profile(runtime, name)
    except (FamilyError, LookupError) as error:
        fail(error)
    except redis.RedisError as error:
        fail(f"Redis cannot be reached ({error}); `fineserve up` first")
    if not names:
        fail("no family is calibrated; `fineserve calibrate` one first")


def _profile(runtime: "Runtime", family: str) -> None:
    from tqdm import tqdm

    from worker.build.profiles import Disturbed, refresh_profile

    with tqdm(total=1.0, bar_format="{desc:40} {percentage:3.0f}% |{bar}| {elapsed}") as bar:

        def on_progress(share: float, what: str) -> None:
            bar.set_description_str(f"{family}: {what}", refresh=False)
            bar.update(share - bar.n)

        try:
            profile = refresh_profile(runtime, family, on_progress)
        except Disturbed as error:
            fail(error)
    typer.echo(f"{family} on {profile.device_class}, torch {profile.torch_version}: stored")


@cli.command()
def previews(
    family: FamilyDirectory,
) -> None:
    """Sample every class at every size of a family, for the page; a minute or two."""
    from tqdm import tqdm

    from learngenes.family.previews import write_previews

    loaded = _loaded(family)
    with tqdm(unit=" sizes") as bar:

        def on_size(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        with _refusals():
            file = write_previews(loaded, family, on_size)
    typer.echo(f"{file} is written")


@cli.command()
def calibrate(
    family: FamilyDirectory,
    points: Annotated[int, typer.Option(min=2, help="at most, of depths and of ranks")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="of Sigma retraining, for each size")] = 300,
    data: Annotated[
        Path | None,
        typer.Option(help="real images, train and test: measure what pictures are worth, too"),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="file of results; another run goes on from it")
    ] = None,
) -> None:
    """Measure what each size of a family is worth, and store it there; minutes to an hour.

    With `--data`, pictures by several samplings are measured, too, which takes hours on a CPU:
    plans then choose the sampling beside the size.
    """
    from tqdm import tqdm

    from learngenes.config import Sampling, Size
    from learngenes.family.family import write_quality
    from learngenes.training.calibrate import calibrate as measure
    from learngenes.training.pictures import pictures_config
    from learngenes.training.retrain import RetrainingConfig

    loaded = _loaded(family)
    with tqdm(total=0, unit="size") as bar:

        def on_size(done: int, total: int, size: Size, before: float, after: float) -> None:
            bar.total = total
            bar.set_description(f"L{size.depth} r{size.rank}: {before:.4f} -> {after:.4f}")
            bar.update(done - bar.n)

        def on_pictures(size: Size, sampling: Sampling, distance: float, accuracy: float) -> None:
            bar.write(
                f"L{size.depth} r{size.rank}, {sampling.num_inference_steps} steps, guided "
                f"{len(sampling.guided)}: distance {distance:.1f}, accuracy {accuracy:.3f}"
            )

        config = RetrainingConfig(steps=steps, max_seconds=float("inf"))
        with _refusals():
            pictures = None if data is None else pictures_config(loaded, data, work)
        table = measure(loaded, config, points, on_size, pictures, on_pictures)
    write_quality(family, table)
    typer.echo(f"{family}/quality.json is written; restart its workers")


@cli.command()
def publish(
    family: FamilyDirectory,
) -> None:
    """Put a family into the artifact store: workers of every host serve it within a minute."""
    from registry.errors import StorageFull, StoreAway, StoreRefuses
    from registry.published import publish as put
    from registry.store import open_store

    loaded = _loaded(family)
    name = loaded.manifest.name
    try:
        put(open_store(get_settings()), family, name, loaded.fingerprint)
    except (StorageFull, StoreAway, StoreRefuses) as error:
        fail(error)
    typer.echo(f"{name} is published; a host that has a family {name} of its own serves that")


@cli.command()
def shapes(
    network: Annotated[str | None, typer.Argument(help="none lists them")] = None,
    directory: Annotated[
        Path | None, typer.Option(help="write the family there, instead of publishing it")
    ] = None,
) -> None:
    """Try sizing on the shapes of a well-known network: a family of random weights.

    Plans, memory and latency are those of the real network; its pictures are noise, and its
    quality a formula. A running service plans with it after a minute or two.
    """
    from learngenes.family.synthetic import SHAPES, millions, sizes_of, write_synthetic_family

    if network is None:
        for name, each in SHAPES.items():
            typer.echo(
                f"{name:14} {each.depth} layers, width {each.width}, {each.tokens} tokens: "
                f"{millions(each):.0f} million parameters"
            )
        return
    if network not in SHAPES:
        fail(f"no shapes of {network!r}; there are {', '.join(SHAPES)}")
    shape = SHAPES[network]
    if directory is not None:
        if directory.exists():
            fail(f"{directory} exists; choose another name, or remove it")
        write_synthetic_family(directory, shape, sizes_of(shape))
        typer.echo(
            f"{directory} is written; FINESERVE_FAMILIES_DIR={directory.parent} fineserve up"
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        family = Path(folder) / f"{network}-shapes"
        write_synthetic_family(family, shape, sizes_of(shape))
        publish(family)


@cli.command(hidden=True)
def synthesise(
    directory: Annotated[Path, typer.Argument(help="where; its last part is the family's name")],
) -> None:
    """What `shapes dit-xl-2-256 --directory` does; its older name."""
    shapes("dit-xl-2-256", directory)


@cli.command()
def pretrain(
    config: FamilyConfig,
    work: Work,
    family: NewFamily,
    start: Annotated[Path | None, typer.Option(help="a family to go on with")] = None,
) -> None:
    """Phase 1: train a family's learngenes. `accelerate launch -m fineserve` uses several GPUs."""
    from learngenes.training.new_family import pretrain_family

    with _refusals():
        pretrain_family(config, work, family, start)


@cli.command()
def condense(
    teacher: Annotated[str, typer.Argument(help="a DiT's directory, or a hub's name")],
    config: FamilyConfig,
    work: Work,
    family: NewFamily,
    import_only: Annotated[bool, typer.Option(help="stop once its own layers are there")] = False,
) -> None:
    """Make a family from a DiT of diffusers: import it, fit factors to its weights, distil.

    Once it is imported, after minutes, it can be served by leaving layers out and in few bits.
    """
    if importlib.util.find_spec("tensorly") is None:
        fail("TensorLy is missing: pip install 'fineserve[condense]'")
    from learngenes.training.condense import REPORT
    from learngenes.training.condense import condense as make

    with _refusals():
        make(teacher, config, work, family, import_only=import_only)
    if import_only:
        typer.echo(f"{family} is imported; without --import-only its shared sizes follow")
    else:
        typer.echo((family / REPORT).read_text())


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Tell in one line what is wrong with a family, its data or its configuration."""
    from learngenes.config import ConfigError
    from learngenes.data.images import DataError
    from learngenes.data.latents import AutoencoderError
    from learngenes.family.family import FamilyError
    from learngenes.formats.teacher import TeacherError
    from learngenes.judging.frechet import FeaturesMissing
    from learngenes.training.config import TrainingError

    try:
        yield
    except (
        AutoencoderError,
        ConfigError,
        DataError,
        FamilyError,
        FeaturesMissing,
        TeacherError,
        TrainingError,
    ) as error:
        fail(error)


def _loaded(directory: Path) -> "Family":
    from learngenes.device import default_device
    from learngenes.family.family import load_family

    with _refusals():
        return load_family(directory).to(default_device())
