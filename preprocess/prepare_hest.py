"""Bring samples of HEST-1k (Jaume et al. 2024) into the documented layout, as a data set of your own name.

    python preprocess/prepare_hest.py --source HEST --data_dir data --name hest_idc --ids TENX95,TENX99,NCBI783,NCBI785

HEST is the download: st/<id>.h5ad, patches/<id>.h5, and where wanted wsis/<id>.tif, with the metadata table HEST_v*.csv,
which says who is the patient of a sample. Patients, samples and pixel sizes go into dataset.yaml. Samples with a whole-slide
image use it; the others use their patches, which allow target features but no neighbors (MODEL.use_neighbor=false).
HEST-1k is licensed CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils._interrupts  # noqa: F401, I001  first: the rest takes seconds

import glob
import re
from collections.abc import Mapping, Sequence

from anndata import AnnData

from datasets.known_sets import SPECS
from datasets.layout import IMAGE_SUFFIXES, Layout
from datasets.spec import DatasetSpec, read_spec, write_spec
from preprocess.raw.files import image_size
from preprocess.raw.gene_map import GIVE_MAP, WHERE, read_gene_map
from preprocess.raw.hest import (
    HestSample,
    check_gene_names,
    check_image_size,
    check_metadata,
    patients_of,
    pixel_size,
    pixels,
    read_expression,
    read_metadata,
)
from preprocess.raw.hest_patches import HestPatches, microns_of_patches
from preprocess.raw.prepare import (
    Options,
    Prepared,
    RawSlide,
    chosen_slides,
    options_of,
    parser,
    prepare,
    source_folder,
)
from utils.cli import run, say
from utils.files import safe_name
from utils.text import some

CONTENTS = "the HEST-1k download: st/<id>.h5ad, patches/<id>.h5 or wsis/<id>.tif, and the metadata table HEST_v*.csv"


def prepare_hest(
    source: Path,
    data_dir: Path,
    options: Options,
    *,
    name: str = "hest",
    ids: str | None = None,
    metadata: Path | None = None,
    gene_map: Path | None = None,
) -> list[Prepared]:
    """Prepare the samples `ids` ("A,B"; None = all in st/) as the data set `name`. See `preprocess.raw.prepare.prepare`.

    metadata: the table; None = the one HEST_v*.csv below the source.  gene_map: table of Ensembl ids and symbols.
    Raises ValueError / FileNotFoundError naming the sample and file that is missing, damaged, or has other gene names.
    """
    if safe_name(name, "--name") in SPECS:
        raise ValueError(
            f"--name {name} is the name of another data set; choose one of your own, for example hest_{name}."
        )
    source = source_folder(source, CONTENTS)
    found = [path.stem for path in (source / "st").glob("[!.]*.h5ad")]
    names = chosen_slides(found, ids, source / "st", of=name, contents=CONTENTS, flag="--ids")
    samples = find_samples(source, names, metadata or find_metadata(source))
    symbols = read_gene_map(gene_map) if gene_map else None
    check_gene_names(samples, symbols)
    spec = DatasetSpec(
        name=name,
        patients=tuple(sorted({sample.patient for sample in samples})),
        patient_of_slide={sample.name: sample.patient for sample in samples},
        slides=tuple(names),
    )
    layout = Layout(data_dir, spec)
    check_spec(layout, overwrite=options.overwrite)
    by_name = {sample.name: sample for sample in samples}
    remedy = GIVE_MAP if gene_map is None else f"{gene_map} lacks most of these ids; --gene_map should be {WHERE}."
    done = prepare(
        layout, names, lambda sample: read_sample(layout, by_name[sample], options, symbols), options, remedy=remedy
    )
    if options.overwrite or not layout.spec_path.exists():  # one that is there may have been edited
        write_spec(layout.spec_path, with_pixel_sizes(layout, samples))
    say(f"{layout.spec_path}: {len(names)} slides of {len(spec.patients)} patients.")
    return done


def find_metadata(source: Path) -> Path:
    """Find the metadata table of the download; the newest if there are several versions.

    Raises FileNotFoundError if there is none, ValueError if there are several of the newest version that differ.
    """
    found = sorted(source.rglob("HEST_v*.csv"))
    if not found:
        raise FileNotFoundError(
            f"No HEST_v*.csv below {source}, so patients are unknown. Give it with --metadata FILE."
        )
    versions = [[int(number) for number in re.findall(r"\d+", path.stem)] for path in found]
    newest = [path for path, version in zip(found, versions, strict=True) if version == max(versions)]
    if len({path.read_bytes() for path in newest}) > 1:
        raise ValueError(f"{some(newest)} are of one version and differ. Give the right one with --metadata FILE.")
    return newest[0]


def find_samples(source: Path, names: Sequence[str], metadata: Path) -> list[HestSample]:
    """Find files and metadata of the samples. Raises ValueError for those that the table does not know or has two opinions
    of, and for several images of one."""
    table = read_metadata(metadata)
    unknown = [name for name in names if name not in table.index]
    if unknown:
        raise ValueError(
            f"{metadata} does not know {some(unknown)}. Give the table of this version of HEST: --metadata FILE."
        )
    check_metadata(table, names, metadata)
    table = table.loc[list(names)]
    patients = patients_of(table, names)
    samples = []
    for name in names:
        row = table.loc[name]
        files = sorted((source / "wsis").glob(f"{glob.escape(name)}.*"))
        images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        if len(images) > 1:
            raise ValueError(
                f"Sample {name} has {len(images)} images, expected one: {some(images)}. Move the others away."
            )
        patches = source / "patches" / f"{name}.h5"
        width, height = (pixels(str(row.get(f"fullres_px_{side}", ""))) for side in ("width", "height"))
        samples.append(
            HestSample(
                name=name,
                patient=patients[name],
                expression=source / "st" / f"{name}.h5ad",
                patches=patches if patches.is_file() else None,
                image=images[0] if images else None,
                microns_per_pixel=pixel_size(row),
                image_size=(width, height),
                species=row["species"],
            )
        )
    without = [name for name in names if not table.loc[name, "patient"].strip()]
    if without:
        say(f"No patient is known for {some(without)}: all such samples of one study count as one patient.")
    if len(species := {sample.species for sample in samples}) > 1:
        say(
            f"The samples are of several species ({', '.join(sorted(species))}); only genes of the same name are in common."
        )
    return samples


def read_sample(
    layout: Layout, sample: HestSample, options: Options, gene_map: Mapping[str, str] | None = None
) -> RawSlide:
    """Read one sample; without a whole-slide image only the spots that have a patch.

    Errors as in `read_expression` and `check_image_size`.
    """
    patches = HestPatches(sample, sample.patches) if sample.patches is not None else None
    unchecked = [] if sample.image is None else check_image_size(sample, image_size(sample.image))
    found = read_expression(sample, patches.barcodes if patches else (), gene_map)
    raw = RawSlide(
        name=sample.name,
        counts=found.counts,
        spots=found.spots,
        source=str(sample.expression),
        image=sample.image,
        notes=found.notes + unchecked,
    )
    if sample.image is None and patches is not None:
        raw.spots = found.spots[found.spots["barcode"].isin(patches.barcodes)]
        if raw.spots.empty:
            raise ValueError(
                f"Slide {sample.name}: none of the barcodes of {sample.patches} ({some(patches.barcodes, 2)}) is one of "
                f"{sample.expression} ({some(list(found.spots['barcode']), 2)})."
            )
        if patches.size != layout.patch_size:
            raw.notes.append(
                f"patches of {patches.size} px are in patches_{patches.size}: add --set DATA.patch_size={patches.size} to "
                "every later command"
            )

        def write_patches(joined: AnnData) -> None:
            barcodes = raw.spots.loc[joined.obs_names, "barcode"].tolist()
            path = Layout(layout.data_dir, layout.spec, patch_size=patches.size).cache_path("patch", sample.name)
            patches.write(path, joined, barcodes, overwrite=options.overwrite)

        raw.write_patches = write_patches
    return raw


def check_spec(layout: Layout, *, overwrite: bool) -> None:
    """Raise ValueError if a folder was prepared for other samples or patients, unless --overwrite is given."""
    if not layout.spec_path.exists() or overwrite:
        return
    there = read_spec(layout.spec_path, name=layout.name)
    if dict(there.patient_of_slide) != dict(layout.spec.patient_of_slide):
        raise ValueError(
            f"{layout.spec_path} describes other samples ({some(list(there.slides))}) than those given now "
            f"({some(list(layout.spec.slides))}). Use another --name, or keep that file elsewhere."
        )


def with_pixel_sizes(layout: Layout, samples: Sequence[HestSample]) -> DatasetSpec:
    """Give the spec the pixel sizes of what the features come from: the image at level 0, or the patches."""
    sizes = {}
    for sample in samples:
        microns = sample.microns_per_pixel
        if sample.image is None and sample.patches is not None:
            (path,) = layout.root.glob(f"patches_*/{glob.escape(sample.name)}.h5")
            microns = microns_of_patches(path)
        if microns is not None:
            sizes[sample.name] = float(microns)
    values = {**vars(layout.spec), "microns_per_pixel": sizes or None}
    return DatasetSpec(**values)


def main() -> None:
    """Read the command line and prepare."""
    arguments = parser(__doc__, source=CONTENTS)
    arguments.add_argument(
        "--name", default="hest", help="name of the data set, its folder below --data_dir (default: hest)"
    )
    arguments.add_argument("--ids", help="samples, for example TENX95,NCBI783 (default: all in st/)")
    arguments.add_argument("--metadata", type=Path, help="HEST_v*.csv (default: the one below --source)")
    arguments.add_argument("--gene_map", type=Path, help="table of Ensembl ids and gene symbols")
    given = arguments.parse_args()
    prepare_hest(
        given.source,
        given.data_dir,
        options_of(given),
        name=given.name,
        ids=given.ids,
        metadata=given.metadata,
        gene_map=given.gene_map,
    )


if __name__ == "__main__":
    run(main)
