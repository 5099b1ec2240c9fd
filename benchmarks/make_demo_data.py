"""Make the demo's two text files from the STS benchmark and WikiText-2.

    python make_data.py --stsb DIR --wikitext FILE [--out DIR]

DIR holds train.csv.gz, dev.csv.gz and test.csv.gz (no header: sentence1, sentence2,
score); FILE is wiki.test.raw.gz. The output is byte-identical from run to run.
"""

import argparse
import csv
import gzip
import io
import random
import re
from pathlib import Path

# Image captions (2014, 2015) and SNLI (2017): 0-based rows, both ends included.
ROWS = {"train": (1000, 1999), "dev": (250, 624), "test": (250, 624)}
CAPTIONS, SENTENCES = "stsb-captions.csv.gz", "wikitext-sentences.txt.gz"
ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Lt|Col|Gen|Capt|Sgt|Maj|Adm|Rev|Prof|Jr|Sr|vs|etc|No|Vol|pp|ca|cf|approx|Inc|Ltd|Co|Mt|Ft"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)|\b[A-Z]|\b[a-z]\.[a-z])\.$"
)


def write_gz(path: Path, text: str) -> None:
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(text.encode("utf-8"))


def captions(stsb: Path) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["split", "sentence1", "sentence2", "score"])
    for split, (first, last) in ROWS.items():
        with gzip.open(stsb / f"{split}.csv.gz", "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[first : last + 1]
        if len(rows) != last - first + 1 or any(len(row) != 3 for row in rows):
            raise SystemExit(f"{split}.csv.gz is not the STS benchmark's file")
        writer.writerows([split, *row] for row in rows)
    return out.getvalue()


def detokenise(line: str) -> str:
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)  # paired double quotes
    line = re.sub(r" ([.,;:!?%)\]}])", r"\1", line)
    line = re.sub(r"([(\[{$£€]) ", r"\1", line)
    line = re.sub(r" ('(?:s|re|ve|ll|d|m)|n't)\b", r"\1", line)
    line = re.sub(r"(?<=s) ' (?=\w)", "' ", line)
    return re.sub(r"\s+", " ", line).strip()


def split_sentences(line: str) -> list[str]:
    sentences, start = [], 0
    for match in re.finditer(r'[.!?]"? (?=["A-Z0-9(])', line):
        piece = line[start : match.start() + 1]
        if ABBREVIATION.search(piece) or piece.count("(") > piece.count(")"):
            continue
        sentences.append(line[start : match.end()].strip())
        start = match.end()
    return [*sentences, line[start:].strip()]


def good(sentence: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return (
        5 <= len(sentence.split()) <= 40
        and sentence[0] in '"ABCDEFGHIJKLMNOPQRSTUVWXYZ'
        and sentence.endswith((".", "!", "?", '."', '!"', '?"'))
        and sum(ord(c) > 127 for c in sentence) <= 2
        and letters >= 0.85 * len(sentence)
        and sentence.count('"') % 2 == 0
        and sentence.count("(") == sentence.count(")")
        and not re.search(r"@|<unk>| ['\"] |\s[.,;:]|''|\.\.\s|\(\s*[,;)]", sentence)
    )


def wikitext(path: Path, limit: int) -> str:
    seen, kept = set(), []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in map(str.strip, file):
            if not line or line.startswith("="):
                continue
            for sentence in split_sentences(detokenise(line)):
                if sentence and good(sentence) and sentence.lower() not in seen:
                    seen.add(sentence.lower())
                    kept.append(sentence)
    if len(kept) > limit:  # an even sample, in the order of the text
        kept = [kept[i] for i in sorted(random.Random(0).sample(range(len(kept)), limit))]
    return "\n".join(kept) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stsb", type=Path, required=True, metavar="DIR")
    parser.add_argument("--wikitext", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", metavar="DIR")
    parser.add_argument("--limit", type=int, default=8000, help="WikiText sentences at most (8000)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in ((CAPTIONS, captions(args.stsb)), (SENTENCES, wikitext(args.wikitext, args.limit))):
        write_gz(args.out / name, text)
        print(f"{args.out / name}: {text.count(chr(10))} lines, {(args.out / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
