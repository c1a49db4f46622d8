"""The stage on a tiny base: rows are what the VAE gives, and only what must be encoded is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.photographs import write_dataset_file, write_photographs

from sd3pipe.cache.reader import CacheReader
from sd3pipe.commands.encode_latents import main
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.geometry import views_of_all
from sd3pipe.data.scan import scan
from sd3pipe.encoding import latent_rows
from sd3pipe.encoding.latent_plan import latents_wanted
from sd3pipe.errors import InputError, ParameterError, QuarantineError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.checkpoint import load_vae
from sd3pipe.models.latent_encoding import LatentEncoder
from sd3pipe.models.vae_architecture import VAEArchitecture
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.resolve import resolve

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


@pytest.fixture
def project(tmp_path):
    write_photographs(tmp_path / "pics", NAMES)
    return tmp_path


def encode(project, base, extra="", **options):
    file = write_dataset_file(project / "d.toml", project / "pics", extra=extra)
    params = {"model": str(base.model), "dataset": file, "out": project / "latents"}
    machine = {"max_data_loader_n_workers": 0, "threads": 1}
    main(EncodeLatentsParams(**(params | machine | options)))
    return report(project)


def report(project):
    return json.loads((project / "latents.report.json").read_text())


def contents(project):
    """Every byte of the cache, by name."""
    out = project / "latents"
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def reader(project):
    return CacheReader(project / "latents")


def test_rows_are_the_vaes_moments_of_the_prepared_picture(project, base):
    encode(project, base)
    cache = reader(project)
    names = cache.samples.strings("name").to_list()
    row = cache.row(int(cache.samples.numbers("row")[names.index("coffee.png")]))
    with Image.open(project / "pics" / "coffee.png") as image:
        assert image.size == (160, 107)
        resized = np.asarray(image.resize((160, 107)), np.float32)  # 160 x 96 is the bucket: no resize, cut from row 5
    pixels = torch.from_numpy(resized[5:101].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        mean, logvar = load_vae(str(base.model)).encode(pixels)
    expected = torch.cat([mean, logvar], dim=1)[0].numpy()
    stored = row["moments"].numpy()
    assert stored.dtype == np.float16 and stored.shape == (32, 12, 20)
    assert np.abs(stored - expected).max() <= 1e-3 * np.abs(expected).max()  # float16 has 11 bits


@pytest.mark.long
def test_the_mean_alone_is_the_first_half_of_the_moments(project, base):
    encode(project, base, latent_dtype="float32")
    moments = [reader(project).row(number)["moments"].numpy() for number in range(4)]
    encode(project, base, latent_dtype="float32", latent_mode="mean", out=project / "mean")
    means = CacheReader(project / "mean")
    found = sorted((means.row(number)["mean"].numpy() for number in range(4)), key=lambda row: row.sum())
    wanted = sorted((row[:16] for row in moments), key=lambda row: row.sum())
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.long
def test_batches_and_workers_change_no_bit(project, base):
    encode(project, base)
    alone = contents(project)
    shutil.rmtree(project / "latents")
    shutil.rmtree(project / ".sd3pipe")
    encode(project, base, max_data_loader_n_workers=2)
    assert contents(project) == alone


@pytest.mark.long
def test_flips_are_encoded_from_the_mirrored_picture(project, base):
    counts = encode(project, base, "flip_aug = true", latent_dtype="float32")
    assert counts["encoded"] == 8
    cache = reader(project)
    flips, rows = cache.samples.numbers("flip"), cache.samples.numbers("row")
    plain, flipped = (cache.row(int(rows[list(flips).index(flip)]))["moments"].numpy() for flip in (0, 1))
    assert np.abs(plain[..., ::-1] - flipped).mean() > 0  # a VAE is not symmetric: mirroring latents is not the same
    assert np.abs(plain[..., ::-1] - flipped).mean() < np.abs(plain - flipped).mean()


def test_a_second_run_encodes_nothing_and_imports_no_torch(project, base):
    encode(project, base)
    before = contents(project)
    paths = ["--model", base.model, "--dataset", project / "d.toml", "--out", project / "latents"]
    script = f"""
import sys
from sd3pipe.cli import run
assert run(["encode-latents", *{[str(word) for word in paths]!r}]) == 0
print(sorted({{"torch", "PIL", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert report(project)["reused"] == 4 and report(project)["encoded"] == 0
    assert contents(project) == before


@pytest.mark.long
def test_adding_a_picture_encodes_one_and_taking_it_away_none(project, base):
    encode(project, base)
    before = contents(project)
    shutil.copy(project / "pics" / "rocket.jpg", project / "pics" / "same content.jpg")
    assert encode(project, base)["encoded"] == 0  # equal content is one row
    image = Image.open(project / "pics" / "coffee.png").transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    image.save(project / "pics" / "new.png")
    assert encode(project, base)["encoded"] == 1
    for name in ("new.png", "same content.jpg"):
        (project / "pics" / name).unlink()
    assert encode(project, base)["encoded"] == 0
    assert contents(project) == before


@pytest.mark.long
def test_weights_of_subsets_change_no_row(project, base):
    encode(project, base)
    counts = encode(project, base, "num_repeats = 7\nis_reg = true\nloss_weight = 0.5\nprior_loss_weight = 2")
    assert counts["encoded"] == 0 and counts["reused"] == 4
    subset = reader(project).manifest.subsets["pics"]
    assert (subset["num_repeats"], subset["is_reg"], subset["loss_weight"], subset["prior_loss_weight"]) == (
        7,
        True,
        0.5,
        2,
    )
    assert subset["caption_dropout_rate"] == 0.1


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"latent_mode": "mean"},
        {"latent_dtype": "bfloat16"},
        pytest.param({"vae_dtype": "bfloat16"}, marks=pytest.mark.slow),  # which most CPUs compute slowly
    ],
)
def test_what_changes_numbers_encodes_anew(project, base, options):
    encode(project, base)
    assert encode(project, base, **options)["encoded"] == 4


@pytest.mark.long
def test_random_crops_are_rows_of_their_own(project, base):
    assert encode(project, base, "random_crop = true", crop_variants=3)["encoded"] >= 8
    crops = reader(project).samples.numbers("crop")
    assert sorted(set(crops)) == [0, 1, 2]
    assert encode(project, base, "random_crop = true", crop_variants=2)["encoded"] == 0
    assert encode(project, base, "random_crop = true", crop_variants=2, seed=1)["encoded"] > 0


def test_masks_lie_beside_the_latents(project, base, caplog):
    rgba = Image.open(project / "pics" / "coffee.png").convert("RGBA")
    rgba.putalpha(0)
    rgba.save(project / "pics" / "coffee.png")
    encode(project, base, "alpha_mask = true")
    cache = reader(project)
    names = cache.samples.strings("name").to_list()
    rows = {name: cache.row(int(cache.samples.numbers("row")[number])) for number, name in enumerate(names)}
    assert rows["coffee.png"]["mask"].numpy().shape == rows["coffee.png"]["moments"].shape[1:]
    assert not rows["coffee.png"]["mask"].numpy().any()
    assert "coffee.png: its mask leaves nothing of it to learn from" in caplog.text
    assert (rows["rocket.jpg"]["mask"].numpy() == 1).all()


def test_the_split_stands_in_the_samples(project, base):
    encode(project, base, "validation_split = 0.5\nvalidation_seed = 3")
    splits = reader(project).samples.strings("split").to_list()
    assert set(splits) == {"train", "validation"}
    assert report(project)["validation_rows"] == splits.count("validation")


@pytest.mark.long
def test_a_dry_run_tells_and_leaves_nothing_behind(project, base, capsys):
    with pytest.raises(FileNotFoundError):
        encode(project, base, dry_run=True)  # no report is written
    told = capsys.readouterr().out
    assert "4 rows to encode, 0 there" in told and "to write" in told and "on cpu" in told
    assert not (project / "latents").exists()


@pytest.mark.long
def test_another_recipe_version_says_beforehand_what_it_takes(project, base, monkeypatch, caplog, capsys):
    encode(project, base)
    monkeypatch.setattr("sd3pipe.encoding.latent_plan.RECIPE_VERSION", 2)
    with pytest.raises(FileNotFoundError):
        (project / "latents.report.json").unlink()
        encode(project, base, dry_run=True)
    assert "4 rows to encode, 0 there" in capsys.readouterr().out
    assert encode(project, base)["encoded"] == 4
    told = "version 1 of its recipe, this sd3pipe has version 2, which makes its rows anew"
    assert [told in line for line in caplog.messages].count(True) == 2
    assert "4 rows to encode, 0 there, 0 of 4 pictures left out; about " in caplog.text
    caplog.clear()
    encode(project, base)
    assert told not in caplog.text


@pytest.mark.long
def test_shards_fill_one_cache_together(project, base):
    encode(project, base)
    whole = contents(project)
    shutil.rmtree(project / "latents")
    shutil.rmtree(project / ".sd3pipe")
    assert encode(project, base, shard="0/2")["left"] > 0
    counts = encode(project, base, shard="1/2")
    assert counts["left"] == 0 and counts["encoded"] > 0
    assert contents(project) == whole


def test_the_summary_tells_where_max_bucket_reso_costs_pixels(tmp_path, base, capsys):
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (320, 180)).save(tmp_path / "pics" / "wide.png")
    limits = "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32"
    (tmp_path / "d.toml").write_text(
        f"[[datasets]]\nresolution = 128\n{limits}\n[[datasets.subsets]]\nimage_dir = 'pics'"
    )
    main(
        EncodeLatentsParams(
            model=str(base.model),
            dataset=tmp_path / "d.toml",
            out=tmp_path / "o",
            max_data_loader_n_workers=0,
            threads=1,
        )
    )
    told = "1 row smaller than the resolution (128 x 64 instead of the area of 128 x 128: max_bucket_reso = 128 cuts"
    assert told in capsys.readouterr().out


def break_pictures(project, count):
    for number in range(count):
        (project / "pics" / f"broken{number}.png").write_bytes(b"")


@pytest.mark.long
def test_one_broken_picture_costs_a_quarantine_entry(project, base):
    break_pictures(project, 1)
    counts = encode(project, base)
    assert (counts["encoded"], counts["quarantined"], counts["exit_code"]) == (4, 1, 0)
    (entry,) = reader(project).manifest.quarantined
    assert (entry["name"], entry["subset"], entry["reason"]) == ("broken0.png", "pics", "the file is empty")


@pytest.mark.parametrize("broken, options", [(1, {"strict": True}), (2, {}), (2, {"max_quarantined": "1"})])
def test_too_many_broken_pictures_end_with_code_5_and_the_good_rows(project, base, broken, options):
    break_pictures(project, broken)
    with pytest.raises(QuarantineError, match=r"broken0\.png"):
        encode(project, base, **options)
    assert report(project)["exit_code"] == 5
    assert len(reader(project).samples) == 4


@pytest.mark.parametrize("limit", ["2", "40%"])
def test_the_limit_can_be_raised(project, base, limit):
    break_pictures(project, 2)
    assert encode(project, base, max_quarantined=limit)["quarantined"] == 2


def test_pictures_that_vanish_while_they_are_encoded_are_unreadable(project, base, monkeypatch):
    real = latent_rows.encoded_rows

    def gone(*given):
        shutil.rmtree(project / "pics")
        return real(*given)

    monkeypatch.setattr(latent_rows, "encoded_rows", gone)
    with pytest.raises(QuarantineError, match="4 of 4 pictures unreadable"):
        encode(project, base)


@pytest.mark.parametrize("moment", ["gone", "other bytes"])
def test_a_picture_that_was_not_there_for_a_moment_is_encoded_by_the_next_run(project, base, monkeypatch, moment):
    picture, kept = project / "pics" / "coffee.png", project / "kept.png"
    real = latent_rows.encoded_rows

    def away(*given):
        picture.rename(kept)
        if moment == "other bytes":
            shutil.copy(project / "pics" / "chelsea.png", picture)
        try:
            yield from real(*given)
        finally:
            kept.replace(picture)

    with monkeypatch.context() as patch:
        patch.setattr(latent_rows, "encoded_rows", away)
        counts = encode(project, base)
    assert (counts["encoded"], counts["quarantined"]) == (3, 1)
    (entry,) = reader(project).manifest.quarantined
    assert entry["reason"].startswith("it cannot be read (" if moment == "gone" else "it changed while ")
    counts = encode(project, base)
    assert (counts["encoded"], counts["reused"], counts["quarantined"]) == (1, 3, 0)
    assert len(reader(project).samples) == 4 and reader(project).manifest.quarantined == ()


def test_a_dataset_of_broken_pictures_alone_is_an_error(project, base):
    shutil.rmtree(project / "pics")
    (project / "pics").mkdir()
    break_pictures(project, 2)
    with pytest.raises(InputError, match="none of 2 pictures can be used"):
        encode(project, base)


def test_numbers_that_do_not_fit_the_rows_are_an_error(base):
    encoder = LatentEncoder(load_vae(str(base.model)), batch_size=1, mode="mean", stored_as=torch.float16)
    good = torch.full((1, 16, 2, 2), 60000.0)
    assert next(encoder.finish(good, ["a.png"])).dtype == torch.float16
    with pytest.raises(InputError, match=r"a\.png: its latents reach 7e\+04, beyond float16: set latent_dtype"):
        next(encoder.finish(good + 10000, ["a.png"]))
    with pytest.raises(InputError, match="no finite numbers"):
        next(encoder.finish(good * float("nan"), ["a.png"]))


def test_a_row_depends_on_no_neighbour_and_no_place_in_the_batch(base):
    encoder = LatentEncoder(load_vae(str(base.model)), batch_size=3, mode="moments", stored_as=torch.float16)
    pictures = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in range(3)]
    together = encoder.start(pictures)
    assert torch.equal(encoder.start(pictures[2:])[0], together[2])
    assert torch.equal(encoder.start(pictures[::-1])[0], together[2])


@pytest.mark.parametrize(
    "given", [{"shard": "2/2"}, {"shard": "x"}, {"max_quarantined": "-1"}, {"vae_batch_size": "0"}]
)
def test_options_out_of_range_are_refused(given):
    with pytest.raises(ParameterError, match=next(iter(given)).replace("_", "-")):
        resolve(EncodeLatentsParams, "encode-latents", {"dataset": "d.toml", "out": "o", **given})


def test_keys_stay_what_they_are(project, base):
    """Another key for the same row would encode every user's pictures anew."""
    Image.fromarray(np.arange(128 * 128 * 3, dtype=np.uint32).astype(np.uint8).reshape(128, 128, 3)).save(
        project / "pics" / "golden.bmp"
    )
    file = write_dataset_file(project / "d.toml", project / "pics", extra="flip_aug = true")
    dataset = load_dataset(file)
    pictures, _ = views_of_all(scan(dataset, FileStamps(project / "stat.json")), crop_variants=1, seed=42)
    views = [view for of_picture in pictures for view in of_picture]
    recipe = {"latent_mode": "moments", "latent_dtype": "float16", "vae_dtype": "float32"}
    wanted = latents_wanted(views, [], dataset, VAEArchitecture(), "f" * 64, recipe)
    names = wanted.samples["name"]
    assert [wanted.keys[n][:16] for n in range(len(names)) if names[n] == "golden.bmp"] == GOLDEN_KEYS


GOLDEN_KEYS = ["f7516e12dccc566e", "9842612d05621fbb"]


@pytest.mark.long
def test_paths_enter_no_key(project, base, tmp_path_factory):
    encode(project, base)
    other = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(project / "pics", other / "pics")
    encode(other, base)
    assert contents(project) == contents(other)
    assert not any(str(project).encode() in data for data in contents(project).values())
    assert Path(project / ".sd3pipe").is_dir()


def test_a_refused_encode_leaves_the_report_of_the_last_one(project, base):
    encode(project, base)
    before = report(project)
    with pytest.raises(InputError):
        encode(project, base, vae=project / "nothing.safetensors")
    assert report(project) == before
    assert json.loads((project / "latents.refused.report.json").read_text())["exit_code"] == 3
