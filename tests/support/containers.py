"""Pictures with captions in files that hold several: tars, Parquet, and folders that `datasets` saves."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

Content = Mapping[str, bytes]  # by name, pictures and captions


def write_tar(file: Path, content: Content) -> Path:
    """Writes members in the order of their names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name in sorted(content):
            member = tarfile.TarInfo(name)
            member.size = len(content[name])
            tar.addfile(member, io.BytesIO(content[name]))
    return file


def table(content: Content):
    """Returns the table {image: {bytes, path}, text} that the `datasets` library makes of pictures and .txt files."""
    import pyarrow

    names = [name for name in sorted(content) if not name.endswith(".txt")]
    texts = [content.get(str(Path(name).with_suffix(".txt"))) for name in names]
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.table(
        {
            "image": pyarrow.array([{"bytes": content[name], "path": name} for name in names], image),
            "text": pyarrow.array([None if text is None else text.decode() for text in texts], pyarrow.string()),
        }
    )


def write_parquet(file: Path, content: Content, *, rows_in_a_group: int = 7) -> Path:
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(content), file, row_group_size=rows_in_a_group)
    return file


def write_datasets_folder(folder: Path, content: Content, *, rows_in_a_batch: int = 7) -> Path:
    """Writes what `Dataset.save_to_disk` writes."""
    import pyarrow

    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    rows = table(content)
    with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=rows_in_a_batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def folder_content(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
