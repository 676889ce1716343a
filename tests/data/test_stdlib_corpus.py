import json
import os
import zipfile

import pytest

from megamtp.data.preprocess.stdlib_corpus import MAX_FILE_BYTES, gather_stdlib, stdlib_root
from megamtp.errors import UserError
from tools.gather_stdlib import main


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(folder):
    """{"train": {path: text}, "validation": {path: text}}, in file order."""
    splits = {}
    for name in ("train", "validation"):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert all(list(line) == ["path", "text"] for line in lines)
        splits[name] = {line["path"]: line["text"] for line in lines}
        assert len(splits[name]) == len(lines)
    return splits


def everything(folder):
    splits = read(folder)
    return splits["train"] | splits["validation"]


@pytest.fixture
def tree(tmp_path):
    """100 modules of real code: enough for both splits."""
    root = tmp_path / "lib"
    write(root, {f"package_{i % 7}/module_{i}.py": f"def f_{i}(x):\n    return x + {i}\n" for i in range(100)})
    return root


def test_splits_are_disjoint_complete_sorted_and_counted(tree, tmp_path):
    stats = gather_stdlib(tree, tmp_path / "out")
    splits = read(tmp_path / "out")
    train, validation = splits["train"], splits["validation"]
    assert train and validation and not train.keys() & validation.keys()
    assert list(train) == sorted(train) and list(validation) == sorted(validation)
    assert train | validation == {p.relative_to(tree).as_posix(): p.read_text() for p in tree.rglob("*.py")}
    assert (stats.train.files, stats.validation.files) == (len(train), len(validation))
    assert stats.train.bytes == sum(len(text) for text in train.values())
    assert stats.skipped == {}
    assert sorted(os.listdir(tmp_path / "out")) == ["train.jsonl", "validation.jsonl"]


def test_the_same_tree_gives_the_same_bytes(tree, tmp_path):
    gather_stdlib(tree, tmp_path / "a")
    gather_stdlib(tree, tmp_path / "b")
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_keeps_its_side_when_others_come_and_go(tree, tmp_path):
    gather_stdlib(tree, tmp_path / "before")
    before = read(tmp_path / "before")
    for path in sorted(tree.rglob("*.py"))[::9]:
        if path.relative_to(tree).as_posix() in before["train"]:
            path.unlink()
    write(tree, {f"another_{i}.py": f"value = {i}\n" for i in range(30)})
    gather_stdlib(tree, tmp_path / "after")
    after = read(tmp_path / "after")
    assert before["validation"].keys() <= after["validation"].keys()
    assert not before["train"].keys() & after["validation"].keys()


def test_skips_what_is_no_code(tree, tmp_path):
    clean = {p.relative_to(tree).as_posix() for p in tree.rglob("*.py")}
    table = "".join(f"    {i}: 'x{i}',\n" for i in range(40))
    write(
        tree,
        {
            "latin_1.py": "name = 'é'\n".encode("latin-1"),
            "broken.py": "def f(:\n",
            "null_byte.py": "x = 1\0\n",
            "empty.py": "",
            "blank.py": "\n \n",
            "huge.py": "# " + "x" * MAX_FILE_BYTES,
            "entities.py": f'"""Generated."""\n\ntable = {{\n{table}}}\n',
            "encodings/cp437.py": "import codecs\n",
            "entities_update.py": f"table = {{}}\ntable.update({{\n{table}}})\n",
            "zz_copy.py": "def f_0(x):\n    return x + 0\n",  # the contents of package_0/module_0.py
            "site-packages/torch.py": "a = 1\n",
            "dist-packages/numpy.py": "a = 2\n",
            "pkg/__pycache__/cached.py": "a = 3\n",
            "test/test_os.py": "import os\n",
            "unittest/test/test_case.py": "import unittest\n",
            "notes.txt": "no code\n",
        },
    )
    stats = gather_stdlib(tree, tmp_path / "out")
    assert everything(tmp_path / "out").keys() == clean
    assert stats.skipped == {
        "codec": 1,
        "does not parse": 2,
        "duplicate": 1,
        "empty": 2,
        "mostly tables": 2,
        "not UTF-8": 1,
        "test suite": 2,
        "too large": 1,
    }
    gather_stdlib(tree, tmp_path / "more", include_tests=True)
    assert everything(tmp_path / "more").keys() == clean | {"test/test_os.py", "unittest/test/test_case.py"}


def test_keeps_code_beside_a_table_and_under_a_long_docstring(tree, tmp_path):
    table = "".join(f"    {i}: 'x{i}',\n" for i in range(20))
    code = "".join(f"def g_{i}():\n    return table[{i}]\n\n" for i in range(20))
    prose = '"""' + "a line\n" * 40 + '"""\n' + "import os\n"
    write(tree, {"mixed.py": f"table = {{\n{table}}}\n{code}", "prose.py": prose, "unicode.py": "s = 'é\u2028日'\n"})
    gather_stdlib(tree, tmp_path / "out")
    texts = everything(tmp_path / "out")
    assert texts["unicode.py"] == "s = 'é\u2028日'\n"
    assert {"mixed.py", "prose.py"} <= texts.keys()


def test_refuses_an_interpreter_without_sources(tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "python311.zip", "w") as archive:
        archive.writestr("os.py", "import sys\n")
    with pytest.raises(UserError, match="not a folder of Python sources"):
        gather_stdlib(tmp_path / "python311.zip", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "os.pyc").write_bytes(b"\0")
    with pytest.raises(UserError, match="no Python source for the train split"):
        gather_stdlib(tmp_path / "bare", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken.*cannot write"):
        gather_stdlib(tree, tmp_path / "taken")


def test_this_interpreter(tmp_path, capsys):
    """The real library, by the command: a few MB of code, 2-8 % of it for validation, every file the one on disk."""
    main(["--output-dir", str(tmp_path)])
    splits = read(tmp_path)
    size = {name: sum(len(text) for text in files.values()) for name, files in splits.items()}
    assert 5e6 < size["train"] < 20e6
    assert 0.02 < size["validation"] / size["train"] < 0.08
    assert not any(path.startswith(("test/", "encodings/")) for path in everything(tmp_path))
    assert splits["train"].keys() | splits["validation"].keys() >= {"os.py", "ast.py", "json/decoder.py"}
    assert everything(tmp_path)["json/decoder.py"] == (stdlib_root() / "json" / "decoder.py").read_text("utf-8")
    assert "train.jsonl: " in capsys.readouterr().out
