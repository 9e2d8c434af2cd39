"""The one owner of every path below data_dir. No other module joins folder names."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets.spec import SPEC_FILE, DatasetSpec
from utils.commands import extraction_command
from utils.config import Data
from utils.files import safe_name
from utils.text import located, some

COUNT_SUFFIXES = ("_sub.parquet", ".parquet", ".tsv.gz", ".tsv", ".csv", ".h5ad")  # the first is what scripts write
SPOT_SUFFIX = "_selection.tsv"
PLAIN_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".btf")
SCANNER_SUFFIXES = (".svs", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".bif", ".svslide", ".qptiff")
IMAGE_SUFFIXES = frozenset(PLAIN_SUFFIXES + SCANNER_SUFFIXES)


class Layout:
    """Where everything of one data set lies.

    data_dir:  the folder of all data sets (`--data_dir`).
    spec:      the data set; an external one lies in data_dir/test/<test_name>.
    test_name: name of an external set; default the spec's own name if it is external.
    patch_size, patch_um (see DATA.patch_um), num_neighbors, encoder: they name the folders of the caches; those of UNI
        leave the encoder out, as documented.
    root: the folder itself, where it lies elsewhere (a download in the documented layout).
    extraction: spells the command that `repair` gives, with the configuration of whoever opens the folder.
    """

    def __init__(
        self,
        data_dir: str | Path,
        spec: DatasetSpec,
        test_name: str | None = None,
        *,
        patch_size: int = 224,
        num_neighbors: int = 5,
        encoder: str = Data.encoder,
        patch_um: float | None = None,
        root: str | Path | None = None,
        extraction: Callable[..., str] = extraction_command,
    ):
        self.data_dir = Path(data_dir)
        self.spec = spec
        if test_name is None and spec.external:
            test_name = spec.name
        self.name = safe_name(test_name or spec.name, "Data set")
        self.is_external = bool(test_name)
        inside = Path("test") / self.name if test_name else Path(self.name)
        self.root = Path(root) if root is not None else self.data_dir / inside
        self.patch_size = patch_size
        self.num_neighbors = num_neighbors
        self.encoder = encoder
        self.patch_um = patch_um
        self._extraction = extraction

    def repair(self, kind: str, slides: str | None = None, encoder: str | None = None) -> str:
        """Spell the command that makes features where this folder keeps them. Ask only when something is wrong.

        kind: as for `cache_path`, or "all".  slides: comma separated, None for all.
        """
        return self._extraction(
            kind,
            slides,
            encoder,
            data_dir=self.data_dir,
            test_name=self.name if self.is_external else None,
            patch_size=self.patch_size,
            num_neighbors=self.num_neighbors,
            patch_um=self.patch_um,
        )

    @property
    def counts_dir(self) -> Path:
        """Folder of the counts, a file a slide."""
        return self.root / "ST-cnts"

    @property
    def spots_dir(self) -> Path:
        """Folder of the spot tables."""
        return self.root / "ST-spotfiles"

    @property
    def images_dir(self) -> Path:
        """Folder of the images; the spec says how they are named below it."""
        return self.root / "ST-imgs"

    @property
    def labels_dir(self) -> Path:
        """The pathologist's labels, where a data set has them."""
        return self.root / "ST-pat" / "lbl"

    @property
    def panel_path(self) -> Path:
        """The gene panel of the data set."""
        return self.root / f"genes_{self.name}.npy"

    @property
    def panel_index_path(self) -> Path:
        """Indices of an external set's panel genes into the training panel."""
        return self.root / "ind_match.npy"

    @property
    def spec_path(self) -> Path:
        """The description of the data set, where its folder has one."""
        return self.root / SPEC_FILE

    def new_counts_path(self, slide: str) -> Path:
        """Name the file that the preparing scripts write the counts of a slide to."""
        return self.counts_dir / f"{safe_name(slide, 'Slide')}{COUNT_SUFFIXES[0]}"

    def counts_path(self, slide: str) -> Path:
        """Find the counts of a slide, in any of the accepted spellings.

        What a preparing script has written goes before what it was made from, which published folders keep beside it.
        Raises FileNotFoundError, which names the spellings, or ValueError for several tables that no script has written.
        """
        found = self._tables_of(slide)
        if self._is_unclear(found):
            others = [name for name in self.slides_with_counts() if self._is_unclear(self._tables_of(name))]
            raise ValueError(
                f"Slide {slide} of {self.name} has {len(found)} tables of counts where one was expected: "
                f"{', '.join(path.name for path in found)}. Keep the right one in {self.counts_dir} and move the others away"
                f"{f', as for each of {some(others, 12)}' if len(others) > 1 else ''}."
            )
        if found:
            return found[0]
        raise FileNotFoundError(
            f"Slide {slide} of {self.name} has no counts: none of {', '.join(slide + s for s in COUNT_SUFFIXES)} is in "
            f"{self.counts_dir}. {self._prepare_hint()}"
        )

    def spots_path(self, slide: str) -> Path:
        """Name the spot table of a slide; whether it exists is for the reader to say."""
        return self.spots_dir / f"{safe_name(slide, 'Slide')}{SPOT_SUFFIX}"

    def image_pattern(self, slide: str, spelled: Callable[[str], str] = str) -> str:
        """Fill in the spec's glob below ST-imgs for a slide. Raises ValueError for a slide without a known patient.

        spelled: writes the names into it; `glob.escape` where the glob is to find files, since names may hold [, * and ?.
        """
        patient = safe_name(self.spec.patient_of(slide), "Patient") if "{patient}" in self.spec.image_pattern else ""
        return self.spec.image_pattern.format(slide=spelled(safe_name(slide, "Slide")), patient=spelled(patient))

    def image_path(self, slide: str) -> Path:
        """Find the one image of a slide. Raises FileNotFoundError if there is none, ValueError if there are several."""
        found = self._images(slide)
        if not found:
            raise FileNotFoundError(
                f"Slide {slide} of {self.name} has no image: nothing matches {self.images_dir / self.image_pattern(slide)}."
                f"{self.patches_note(slide)} {self._prepare_hint()}"
            )
        if len(found) > 1:
            raise ValueError(
                f"Slide {slide} of {self.name} has {len(found)} images where one was expected: "
                f"{', '.join(str(path.relative_to(self.images_dir)) for path in found)}. Keep the full-resolution one in "
                f"{self.images_dir} and move the others away."
            )
        return found[0]

    def cache_path(self, kind: str, slide: str) -> Path:
        """Name our HDF5 cache of a slide; kind is one of "target", "neighbor", "token", "patch"."""
        return self.cache_paths(kind, slide)[0]

    def cache_paths(self, kind: str, slide: str) -> list[Path]:
        """Name every place where the cache of a slide may lie, the usual one first: with and without the encoder's name."""
        name = f"{safe_name(slide, 'Slide')}.h5"
        folders = [self._cache_folder(kind, self._encoder_part), self._cache_folder(kind, "")]
        if kind == "patch":  # no encoder has made it
            folders = folders[1:]
        elif self.encoder == Data.encoder:
            folders.reverse()
        return [self.root / folder / name for folder in folders]

    def caches_of_all_encoders(self, kind: str, slide: str) -> list[Path]:
        """Find the caches of a slide that any encoder has made, sorted."""
        name = glob.escape(safe_name(slide, "Slide"))
        return sorted(self.root.glob(f"{self._cache_folder(kind, '*')}/{name}.h5"))

    def caches_of_all_widths(self, kind: str, slide: str) -> list[Path]:
        """Find the caches of a slide from patches of any width in micrometres, or of none, sorted."""
        folder = self.cache_path(kind, slide).parent.name.removesuffix(f"_{self.patch_um or 0:g}um")
        paths = [*self.root.glob(f"{folder}/*.h5"), *self.root.glob(f"{folder}_*um/*.h5")]
        return sorted(path for path in paths if path.stem == slide)

    @property
    def _encoder_part(self) -> str:
        return "_" + re.sub(r"[^\w.-]", "_", self.encoder)

    def _cache_folder(self, kind: str, encoder_part: str) -> str:
        """Name the folder of a kind of caches below the root."""
        size = f"{self.patch_size}" if self.patch_um is None else f"{self.patch_size}_{self.patch_um:g}um"
        return {
            "target": f"gt_features{encoder_part}_{size}",
            "neighbor": f"n_features{encoder_part}_{self.num_neighbors}_{size}",
            "token": f"token_features{encoder_part}_{size}",
            "patch": f"patches_{size}",
        }[kind]

    def overlay_path(self, slide: str) -> Path:
        """Name the small picture of a slide with its spots drawn on it."""
        return self.root / "overlays" / f"overlay_{safe_name(slide, 'Slide')}.png"

    def published_path(self, kind: str, slide: str) -> Path | None:
        """Find the published `.pt` features of a slide ("target" or "neighbor"), in any spelling of their folder.

        They do not say which encoder made them.
        """
        if kind not in ("target", "neighbor"):
            return None
        parts = [*([] if self.encoder == Data.encoder else [self._encoder_part]), "", "_uni_small"]
        paths = [self.root / self._cache_folder(kind, part) / f"{safe_name(slide, 'Slide')}.pt" for part in parts]
        return next((path for path in paths if path.is_file()), None)

    def slides_with_counts(self) -> list[str]:
        """List the slides that ST-cnts has a file for, sorted. Raises FileNotFoundError if the folder is missing."""
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"The folder of {self.name}, {located(self.root)}, does not exist. {self._prepare_hint()}"
            )
        if not self.counts_dir.is_dir():
            raise FileNotFoundError(f"{self.counts_dir} does not exist. {self._prepare_hint()}")
        names = set()
        for path in self.counts_dir.iterdir():
            suffix = next((s for s in COUNT_SUFFIXES if path.name.endswith(s)), None)
            if suffix and path.is_file() and not path.name.startswith("."):
                names.add(path.name[: -len(suffix)])
        return sorted(names)

    def missing(self, slide: str) -> list[str]:
        """Say what a slide lacks to be used, one phrase each: counts, spot table, patient, image or features in its place."""
        lacks = []
        try:
            self.counts_path(slide)
        except FileNotFoundError:
            lacks.append(f"no counts in {self.counts_dir}")
        if not self.spots_path(slide).is_file():
            lacks.append(f"no spot table {self.spots_path(slide)}")
        if not self._has_features(slide) and not self._images(slide):
            pattern = self.images_dir / self.image_pattern(slide)
            folder = self.cache_path("target", slide).parent
            lacks.append(f"no image {pattern} and no features in {folder}{self.patches_note(slide)}")
        return lacks

    def patches_note(self, slide: str) -> str:
        """Say which patches of another size a slide has, and the flag that takes them; empty if it has none."""
        found = sorted(self.root.glob(f"patches_*/{glob.escape(safe_name(slide, 'Slide'))}.h5"))
        sizes = [path.parent.name.removeprefix("patches_") for path in found]
        return "".join(
            f" Patches of {size} px are in patches_{size}: add --set DATA.patch_size={size}."
            for size in sizes
            if size.isdigit() and size != str(self.patch_size)
        )

    def slides_on_disk(self) -> list[str]:
        """List the slides that can be used: counts, spot table, and an image or features; sorted by name.

        Raises ValueError for slides that the data set does not have, FileNotFoundError if no slide is complete.
        """
        found = self.slides_with_counts()
        strangers = [slide for slide in found if self.spec.slides and slide not in self.spec.slides]
        if strangers:
            raise ValueError(
                f"{self.counts_dir} holds slides that {self.spec.name} does not have: {', '.join(strangers[:5])}"
                f"{f' and {len(strangers) - 5} more' if len(strangers) > 5 else ''}. Move them away, or describe your own "
                f"data set in {self.spec_path}."
            )
        self.spec.check_slides(found, self.spec_path)
        usable = [slide for slide in found if not self.missing(slide)]
        if not usable:
            detail = f" For example {found[0]}: {'; '.join(self.missing(found[0]))}." if found else ""
            raise FileNotFoundError(
                f"No complete slide of {self.name} in {self.root}: {len(found)} have counts.{detail} {self._prepare_hint()}"
            )
        return usable

    def patients_on_disk(self) -> dict[str, str]:
        """Find the patient of each slide that can be used, sorted by slide. Raises as `slides_on_disk`."""
        return {slide: self.spec.patient_of(slide) for slide in self.slides_on_disk()}

    def incomplete_slides(self) -> dict[str, list[str]]:
        """Find the expected or found slides that cannot be used, with what each lacks."""
        slides = sorted(set(self.spec.slides) | set(self.slides_with_counts()))
        return {slide: lacks for slide in slides if (lacks := self.missing(slide))}

    def unread_counts_note(self) -> str | None:
        """Name in a sentence the slides with other tables of counts beside the prepared one; None if there are none."""
        tables = {slide: self._tables_of(slide) for slide in self.slides_with_counts()}
        beside = {slide: found for slide, found in tables.items() if len(found) > 1}
        if not beside:
            return None
        example, (read, *others) = next(iter(beside.items()))
        return (
            f"{len(beside)} of {len(tables)} slides have other tables of counts beside the prepared one, which alone is read: "
            f"{some(list(beside), 12)}. Of {example} {read.name} is read, not {', '.join(path.name for path in others)}. If "
            f"the counts have changed since, prepare them again, or move {read.name} away."
        )

    def left_out_note(self) -> str | None:
        """Name in a sentence the slides that cannot be used, with what the first lacks; None if there are none."""
        incomplete = self.incomplete_slides()
        if not incomplete:
            return None
        example, lacks = next(iter(incomplete.items()))
        remedy = f" Add them: {self.spec.preparation(self.data_dir)}" if self.spec.prepared_by else ""
        return (
            f"{len(incomplete)} slides cannot be used and are left out: {some(list(incomplete), 12)}. {example}: "
            f"{'; '.join(lacks)}.{remedy}"
        )

    def _tables_of(self, slide: str) -> list[Path]:
        """All tables of counts of a slide, in the order of `COUNT_SUFFIXES`."""
        slide = safe_name(slide, "Slide")
        return [path for s in COUNT_SUFFIXES if (path := self.counts_dir / f"{slide}{s}").is_file()]

    @staticmethod
    def _is_unclear(tables: Sequence[Path]) -> bool:
        """Whether none of several tables goes before the others, as the one that a script has written does."""
        return len(tables) > 1 and not tables[0].name.endswith(COUNT_SUFFIXES[0])

    def _images(self, slide: str) -> list[Path]:
        if not self.images_dir.is_dir():
            return []
        matches = self.images_dir.glob(self.image_pattern(slide, glob.escape))
        return sorted(p for p in matches if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and p.name[0] != ".")

    def _has_features(self, slide: str) -> bool:
        kinds = ("target", "token", "patch")
        return any(
            self.published_path(kind, slide) or any(path.is_file() for path in self.cache_paths(kind, slide))
            for kind in kinds
        )

    def _prepare_hint(self) -> str:
        if self.spec.prepared_by is None:
            return "See docs/your_data.md for the folders it needs."
        return f"Prepare it: {self.spec.preparation(self.data_dir)}"
