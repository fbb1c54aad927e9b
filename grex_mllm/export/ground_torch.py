"""Ground expressions with the torch programs of this folder: needs torch, numpy, PIL and tokenizers, none of the model's own code.

python ground_torch.py photo.jpg "the two people on the left" "the dog" --out answers
"""

import ground
import torch


def torch_graphs(folder, facts):
    """Return name -> function from named arrays to named arrays."""
    programs = {name: torch.export.load(str(folder / f"{name}.pt2")).module() for name in facts["graphs"]}

    def run(name, arrays):
        with torch.inference_mode():
            answers = programs[name](*(torch.from_numpy(arrays[key]) for key in facts["graphs"][name]["inputs"]))
        return dict(zip(facts["graphs"][name]["outputs"], (answer.numpy() for answer in answers)))

    return {name: lambda arrays, name=name: run(name, arrays) for name in programs}


if __name__ == "__main__":
    ground.main(torch_graphs)
