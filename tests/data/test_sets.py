"""Known data sets, read from local files with the Hub's columns."""

import json
import time
from pathlib import Path

import pandas
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError

from companion import fit, load_pretrained, load_task
from companion.course.sources import MINILM
from companion.data.sets import (
    KNOWN,
    NER,
    labelled,
    read_known,
    read_rows,
    read_tables,
    read_text,
)
from companion.errors import DataWarning, SourceUnavailable
from companion.evaluation.metrics import METRICS

WORDS = ["a", "few", "plain", "words", "about", "nothing", "at", "all"]


def rows(name, number):
    """Rows as the data set's card shows them."""
    for i in range(number):
        text = f"text {i}: {' '.join(WORDS[: 2 + i % 6])}"
        yield {
            "sst2": {"idx": i, "sentence": text, "label": i % 2},
            "ag_news": {"text": text, "label": i % 4},
            "wikitext-2": {"text": text + ". " + " ".join(WORDS) * 40 if i % 2 else ""},
            "stsb": {"sentence1": text, "sentence2": text[::-1], "score": 1.0 if i % 2 else 0.2},
            "conll2003": {"id": str(i), "tokens": text.split(),
                          "ner_tags": [i % 9] * len(text.split())},
        }[name]  # fmt: skip


def write(folder, name, **sizes):
    for part, size in sizes.items():
        (folder / f"{part}.json").write_text("\n".join(json.dumps(row) for row in rows(name, size)))
    return folder


@pytest.mark.parametrize("name", KNOWN)
def test_known_data_sets_become_tasks(tmp_path, name):
    folder = write(tmp_path, name, train=120, validation=12, test=12)
    options = {"block_size": 64} if name == "wikitext-2" else {}
    task = load_task(name, folder=folder, batch_size=4, **options)
    kind = KNOWN[name].kind
    expected = {"language": "loss", "classification": "accuracy", "tagging": "span F1",
                "retrieval": "recall@1"}  # fmt: skip
    assert task.metric == expected[kind]
    if kind == "language":
        model = load_pretrained("docs-lm")
    else:
        heads = {"classification": "classification", "tagging": "tokens", "retrieval": "retrieval"}
        classes = len(task.classes) or None
        model = load_pretrained(MINILM, head=heads[kind], classes=classes)
    fit(model, task.train, steps=1, lr=1e-5, progress=False)
    measured = METRICS[task.metric].measure(model, task)
    assert measured.scores.value >= 0
    assert measured.scores.estimate().n == (6 if name in ("wikitext-2", "stsb") else 12)


def test_a_test_split_without_labels_is_not_measured_on(tmp_path):
    folder = write(tmp_path, "sst2", train=100, validation=7, test=9)
    parts = read_known("sst2", folder)
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [95, 5, 7]
    assert not {text for text, _ in parts["train"]} & {text for text, _ in parts["validation"]}


def test_tags_are_names(tmp_path):
    parts = read_known("conll2003", write(tmp_path, "conll2003", train=30, validation=9, test=9))
    assert [tags[0] for _, tags in parts["test"]] == list(NER)


def test_the_hub_is_asked_for_what_the_name_stands_for(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return DatasetDict({part: Dataset.from_list(list(rows("wikitext-2", 8)))
                            for part in ("train", "validation", "test")})  # fmt: skip

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(read_known("wikitext-2")["test"]) == 4
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {})]


def test_what_cannot_be_read_says_why(tmp_path):
    with pytest.raises(SourceUnavailable, match="holds no file train"):
        read_known("sst2", tmp_path)
    write(tmp_path, "ag_news", train=40, validation=4)
    with pytest.raises(SourceUnavailable, match="no column 'sentence'"):
        read_known("sst2", tmp_path)
    with pytest.raises(SourceUnavailable, match="no split 'test'"):
        read_known("ag_news", tmp_path)


DOCUMENTS = [f"Document {i} weighs größe {i} 我们." for i in range(20)]


def same(found, documents=DOCUMENTS) -> bool:
    return sorted(text for texts in found.values() for text in texts) == sorted(documents)


@pytest.mark.parametrize(
    "name",
    ["a [1].txt", "[ab]*?.txt", "a b#c%20.txt", "größe.txt", "NOTES.TXT", "d[1]/a.txt", "a.b.txt"],
)
def test_a_name_is_no_pattern(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    assert same(read_text(str(path)))
    folder = path.parent / "[x] y"
    folder.mkdir()
    (folder / "train.txt").write_bytes(path.read_bytes())
    assert same(read_text(str(folder)))


@pytest.mark.parametrize(
    ("codec", "encoding"),
    [("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("utf-32", None), ("utf-8-sig", "utf-8"),
     ("utf-16-le", "utf-16-le"), ("gb18030", "gb18030")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "json"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, kind, codec, encoding, end):
    text = {
        "txt": "\n\n".join(DOCUMENTS),
        "csv": pandas.DataFrame({"text": DOCUMENTS, "n": range(20)}).to_csv(),
        "jsonl": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in DOCUMENTS),
        "json": json.dumps([{"text": text} for text in DOCUMENTS], ensure_ascii=False, indent=1),
    }[kind]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(text.replace("\n", end).encode(codec))
    assert same(read_text(str(path), encoding=encoding))


def test_a_file_without_empty_lines_has_a_document_on_each(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(DOCUMENTS) + "\n")
    assert same(read_text(str(path)))
    path.write_text("\n \n".join(f"{text}\nand more" for text in DOCUMENTS))
    assert same(read_text(str(path)), [f"{text}\nand more" for text in DOCUMENTS])


def test_a_very_long_line_is_a_document(tmp_path):
    long = "word " * 400_000
    for name, text in (("a.txt", "\n".join([long, *DOCUMENTS])),
                       ("a.csv", pandas.DataFrame({"text": [long, *DOCUMENTS]}).to_csv())):  # fmt: skip
        (tmp_path / name).write_text(text)
        assert same(read_text(str(tmp_path / name)), [long, *DOCUMENTS])


def test_what_is_missing_or_blank_is_left_out_before_the_split(tmp_path):
    rows = [{"text": text} for text in DOCUMENTS] + [{"text": None}, {"text": " "}, {"other": 1}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_text(str(path))
    assert same(found)
    assert [len(found[part]) for part in ("train", "validation", "test")] == [16, 2, 2]


def test_splits_are_those_of_datasets(tmp_path):
    """Published numbers on files rest on them."""
    (tmp_path / "a.txt").write_text("\n\n".join(DOCUMENTS))
    most, rest = Dataset.from_dict({"text": DOCUMENTS}).train_test_split(0.2, seed=0).values()
    validation, test = rest.train_test_split(0.5, seed=0).values()
    wanted = {"train": most, "validation": validation, "test": test}
    found = read_text(str(tmp_path / "a.txt"))
    assert found == {part: tuple(data["text"]) for part, data in wanted.items()}


def test_given_splits_are_kept_and_a_missing_one_is_cut_off(tmp_path):
    for part, number in (("train", 20), ("test", 3)):
        (tmp_path / f"{part}.txt").write_text("\n".join(f"{part} {i}" for i in range(number)))
    found = read_text(str(tmp_path))
    assert found["test"] == ("test 0", "test 1", "test 2")
    assert [len(found["train"]), len(found["validation"])] == [18, 2]
    assert all(text.startswith("train") for text in found["validation"])


def write_bytes(content: bytes, name: str):
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


def write_parquet(folder: Path) -> str:
    pandas.DataFrame({"text": range(20), "body": DOCUMENTS}).to_parquet(folder / "a.parquet")
    return str(folder / "a.parquet")


def write_folder(**files: str):
    def write(folder: Path) -> str:
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_text(content)
        return str(folder)

    return write


CHAT = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
ENOUGH = "\n".join(DOCUMENTS)
REFUSED = {
    "latin-1": (write_bytes("größe\n".encode("latin-1") * 20, "a.txt"), {}, "encoding, such as latin-1"),
    "latin-1 csv": (write_bytes(b"text\ngr\xf6\xdfe\n", "a.csv"), {}, "encoding, such as latin-1"),
    "utf-16 without mark": (write_bytes("größe\n".encode("utf-16-le") * 20, "a.txt"), {}, "utf-16"),
    "binary": (write_bytes(b"\x89PNG\r\n\0\0\0\rIHDR\xff\xfe" * 9, "a.txt"), {}, "zero bytes"),
    "unknown encoding": (write_bytes(b"a\n" * 20, "a.txt"), {"encoding": "klingon"}, "write utf-8, latin-1"),
    "wrong encoding": (write_bytes("größe\n".encode() * 20, "a.txt"), {"encoding": "ascii"}, "no text in ascii"),
    "empty": (write_bytes(b"", "a.csv"), {}, "is empty"),
    "blank": (write_bytes(b" \n\n\t\n", "a.txt"), {}, "is empty"),
    "only a mark": (write_bytes(b"\xef\xbb\xbf", "a.txt"), {}, "is empty"),
    "few": (write_bytes(b"One.\n\nTwo.", "a.txt"), {}, "empty lines set documents apart"),
    "numbers": (write_bytes(b"text,body\n1,a\n2,b\n", "a.csv"), {}, "text_column, one of body"),
    "numbers only": (write_bytes(b"text\n1\n2\n", "a.csv"), {}, "no column of text"),
    "numbers in parquet": (write_parquet, {}, "text_column, one of body"),
    "a number among texts": (write_bytes(b'{"text": "a"}\n{"text": 5}', "a.json"), {}, "holds 5"),
    "lists": (write_bytes(b'{"text": ["a"]}', "a.json"), {}, "no text"),
    "another column": (write_bytes(b"body\na\n", "a.csv"), {}, "text_column, one of body"),
    "header only": (write_bytes(b"text,n\n", "a.csv"), {}, "fewer than 10"),
    "uneven csv": (write_bytes(b"text\na\nb,c,d\n", "a.csv"), {}, "line 3"),
    "chat": (write_bytes(CHAT, "a.jsonl"), {}, "apply_chat_template(messages"),
    "chat by name": (write_bytes(CHAT, "a.jsonl"), {"text_column": "messages"}, "holds chats"),
    "half json": (write_bytes(b'{"text": "a"}\n{"text": ', "a.jsonl"), {}, "line 2 is no JSON"),
    "half list": (write_bytes(b'[{"text": "a"},\n{"text"', "a.json"), {}, "line 2 is no JSON"),
    "plain json": (write_bytes(b'"a"\n"b"', "a.jsonl"), {}, "no objects with named columns"),
    "no parquet": (write_bytes(b"PAR1 or not", "a.parquet"), {}, "could not be read"),
    "encoded parquet": (write_parquet, {"encoding": "utf-8"}, "say themselves"),
    "folder": (write_folder(notes_txt="a"), {}, "holds no file train.txt, train.json, ..., but notes.txt"),
    "empty folder": (write_folder(), {}, "holds no file train.txt"),
    "two of a split": (write_folder(train_txt=ENOUGH, train_csv="text\n"), {}, "train.csv and train.txt"),
    "empty split": (write_folder(train_txt=ENOUGH, test_csv="text,n\n,1\n"), {}, "no text for test"),
    "no file": (lambda folder: str(folder / "no.txt"), {}, "there is no file"),
    "no folder": (lambda folder: "./no/such", {}, "there is no file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_says_in_one_line_what_to_do(tmp_path, case):
    write, options, remedy = REFUSED[case]
    with pytest.raises((ValueError, SourceUnavailable)) as caught:
        read_text(write(tmp_path), **options)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [DatasetGenerationError("an error\noccurred"), KeyError("train"), NotImplementedError(), TypeError("x")],
)  # fmt: skip
def test_no_error_of_datasets_gets_through(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(SourceUnavailable, match="owner/name could not be read: ") as caught:
        read_text("owner/name")
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_without_training_split_is_named(monkeypatch):
    data = DatasetDict({"test": Dataset.from_dict({"text": DOCUMENTS})})
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: data)
    with pytest.raises(SourceUnavailable, match="has no split 'train', only test"):
        read_text("owner/name")


def test_without_a_network_the_hub_is_given_up_at_once():
    start = time.perf_counter()
    with pytest.raises(SourceUnavailable, match="nobody/nothing could not be read"):
        read_text("nobody/nothing")
    assert time.perf_counter() - start < 5  # its own client asks for 23 seconds


def test_rows_are_split_as_texts_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "n": i}) for i, t in enumerate(DOCUMENTS)))
    rows, texts = read_rows(str(path)), read_text(str(path))
    assert {part: tuple(row["text"] for row in rows[part]) for part in rows} == texts
    assert rows["test"][0] == {"text": DOCUMENTS[rows["test"][0]["n"]], "n": rows["test"][0]["n"]}
    path.write_text('{"text": "a"}\n{"n": 1}')
    with pytest.raises(SourceUnavailable, match=r"fewer than 10 rows \(2\): too few to split$"):
        read_rows(str(path))
    (tmp_path / "a").mkdir()
    for part, content in (("train", "text\na\n"), ("validation", "text\na\n"), ("test", "text\n")):
        (tmp_path / "a" / f"{part}.csv").write_text(content)
    with pytest.raises(SourceUnavailable, match="leaves no row for test"):
        read_rows(str(tmp_path / "a"))


def classes_of(path, labels, **options):
    pandas.DataFrame({"text": [f"text {i}" for i in range(len(labels))], "label": labels}).to_csv(
        path
    )
    return labelled(str(path), read_tables(str(path)), **options)


def test_labels_are_texts_or_numbers_and_classes_are_sorted(tmp_path):
    path = tmp_path / "a.csv"
    splits, classes = classes_of(path, ["stop", "go", "wait"] * 20)
    assert classes == ("go", "stop", "wait")
    for text, label in splits["train"] + splits["test"]:
        assert classes[label] == ["stop", "go", "wait"][int(text.split()[1]) % 3]
    assert classes_of(path, [10, 9, 2] * 20)[1] == ("2", "9", "10")
    with pytest.warns(
        DataWarning, match="^20 of 60 rows of .* lack 'text' or 'label' and are left out"
    ):
        splits, classes = classes_of(path, [1, 0, None] * 20)  # which pandas reads as fractions
    assert classes == ("0", "1")
    assert sum(map(len, splits.values())) == 40
    assert [len(splits[part]) for part in ("train", "validation", "test")] == [32, 4, 4]


@pytest.mark.parametrize(
    ("labels", "options", "remedy"),
    [
        (["a"] * 20, {}, "one class only, 'a'"),
        (["a"] * 19 + ["b", "c", "d", "e", "f"], {}, "no row of the training split"),
        (["a", "b"] * 9, {"label_column": "kind"}, "no column 'kind'"),
        (["a", "b"] * 9, {"text_column": "body"}, "no column 'body'"),
        (["a", "b"] * 9, {"text_column": "Unnamed: 0"}, "holds 0, which is not text"),
    ],
)
def test_labels_that_cannot_be_learned_say_why(tmp_path, labels, options, remedy):
    with pytest.raises(ValueError, match=remedy):
        classes_of(tmp_path / "a.csv", labels, **options)


def test_lists_are_no_labels(tmp_path):
    rows = [{"text": "a", "label": [0, 1]}] * 20
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="which is not text or a number"):
        labelled("a.json", read_tables(str(tmp_path / "a.json")))
