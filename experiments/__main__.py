"""`python -m experiments NAME`. What there is: experiments/options.py."""

from experiments.options import parse
from program import edges, waiting


def main(argv: list[str] | None = None) -> None:
    name, options, words = parse(argv)
    waiting.spin_briefly()
    # After the command line: --help and a mistyped flag do not wait for torch.
    from experiments import long, records, seeds, tables

    waiting.make_room()

    if name == "seeds":
        seeds.run(options, words)
    elif name == "long":
        long.run(options)
    elif name == "record":
        records.run(options, words)
    else:
        tables.run(name, options)


if __name__ == "__main__":
    with edges.ends("experiments"):
        main()
