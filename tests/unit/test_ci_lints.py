"""The two lints of ci/, each run over a small tree with one seeded violation."""

import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).parents[2] / "ci"


def lint(script: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CI / script), str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


LEAKS = [
    ("core/a.py", "import torch\ntorch.cuda.synchronize()\n", "names a vendor: `cuda`"),
    ("core/a.py", "import torch\nx = torch.version.hip\n", "names a vendor: `hip`"),
    ("core/a.py", "def f(t):\n    return t.is_cuda\n", "asks for the vendor"),
    ("server/a.py", "def f(p):\n    return p.is_rocm()\n", "asks for the vendor"),
    ("server/a.py", "NAME = 'nvidia'\n", "names a vendor in a string"),
    ("core/kv/a.py", "ARCH = 'gfx942'\n", "names a vendor in a string"),
    ("core/a.py", "ARCH = 'sm_90'\n", "names a vendor in a string"),
    ("core/a.py", "def cuda_graph():\n    return 1\n", "names a vendor: `cuda_graph`"),
    ("core/a.py", "def f(d):\n    return d.type == 'cpu'\n", "compares a device's type"),
    ("core/a.py", "def f(d):\n    return d.type in ('cpu', 'xla')\n", "compares a device's type"),
    ("core/a.py", "from ..platforms.cpu import CpuPlatform\n", "imports a concrete platform"),
    ("core/kv/a.py", "from ...platforms import strict\n", "imports a concrete platform"),
    ("server/a.py", "import trimaran.kernels_cpu.load\n", "imports a concrete platform"),
    ("core/scheduler.py", "import torch\n", "imports torch"),
    ("core/kv/blocks.py", "from torch import Tensor\n", "imports torch"),
    ("platforms/a.py", "import pickle\n", "imports a pickling module"),
    ("cli/a.py", "from dill import loads\n", "imports a pickling module"),
    ("core/a.py", "def f(s):\n    return s.recv_pyobj()\n", "recv_pyobj pickles"),
    ("core/a.py", "def f(d):\n    d.broadcast_object_list([1])\n", "pickles"),
    ("core/a.py", "import torch\nx = torch.load('a')\n", "torch.load unpickles"),
    ("core/a.py", "import numpy\nx = numpy.load('a', allow_pickle=True)\n", "allow_pickle"),
    ("core/a.py", "import os\nx = os.environ['A']\n", "os.environ outside"),
    ("cli/a.py", "from os import getenv\n", "os.getenv outside"),
    ("core/a.py", "def f():\n    import json\n    return json\n", "import inside a function"),
    ("core/a.py", "def f():\n    # lazy:\n    import json\n    return json\n", "import inside"),
    ("core/a.py", "try:\n    x = 1\nexcept ValueError:\n    pass\n", "swallows an error"),
    ("core/a.py", "try:\n    x = 1\nexcept ValueError:\n    ...\n", "swallows an error"),
    ("core/a.py", "def f(:\n", "does not parse"),
    ("docs/a.md", "See /" + "work/main for it.\n", "a path of one machine"),
]


@pytest.mark.parametrize(("name", "text", "message"), LEAKS)
def test_a_leak_is_found(tmp_path: Path, name: str, text: str, message: str) -> None:
    write(tmp_path, name, text)
    result = lint("leaks.py", tmp_path)
    assert result.returncode == 1, result.stderr
    assert f"{name}:" in result.stdout
    assert message in result.stdout


CLEAN = [
    ("core/a.py", '"""Where CUDA would replay a graph, ROCm does too."""\n# nvidia, gfx942\n'),
    ("core/a.py", "class A:\n    def __aiter__(self):\n        return self\n"),
    ("core/a.py", "relationship, chip, output = 'ship', 'membership', 'input'\n"),
    ("core/a.py", "def f(part):\n    return part.type == 'text'\n"),
    ("core/a.py", "from ..platforms import Platform\nfrom ..platforms.interface import Device\n"),
    ("core/a.py", "def f():\n    import json  # lazy: 40 ms of start-up\n    return json\n"),
    ("core/env.py", "import os\nx = os.environ.get('TRIMARAN_PLATFORM')\n"),
    ("core/model.py", "import torch\n"),
    ("cli/serve.py", "def f():\n    import json\n    return json\n"),
    ("platforms/registry.py", "def f():\n    from . import cuda\n    return cuda\n"),
    ("platforms/cuda.py", "import torch\ntorch.cuda.synchronize()\n"),
    ("tests/unit/test_a.py", "import os\nimport pickle\nx = os.environ\n"),
    ("docs/a.md", "clock{0}, ..{0} and network{0} are no roots\n".format("/" + "work/")),
]


@pytest.mark.parametrize(("name", "text"), CLEAN)
def test_what_is_allowed_passes(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, name, text)
    result = lint("leaks.py", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("count", "status"), [(10, 0), (11, 1)])
def test_environment_variables_are_counted(tmp_path: Path, count: int, status: int) -> None:
    names = ", ".join(f"'TRIMARAN_V{number}'" for number in range(count))
    write(tmp_path, "core/env.py", f"NAMES = [{names}]\n")
    assert lint("leaks.py", tmp_path).returncode == status


def branches(count: int) -> str:
    return "def f(x):\n" + "    if x:\n        x = 1\n" * count + "    return x\n"


def lines(count: int) -> str:
    return "x = 1\n" * count


def function(count: int) -> str:
    return "def f(x):\n" + "    x = 1\n" * (count - 1)


def arguments(count: int) -> str:
    return f"def f({', '.join(f'a{number}' for number in range(count))}):\n    return 1\n"


SIZES = [
    ("core/a.py", lines(600), 0),
    ("core/a.py", lines(601), 1),
    ("core/a.cpp", "int x;\n" * 601, 1),
    ("kernels_cpu/a.cpp", "int x;\n" * 1000, 0),
    ("kernels_cpu/a.cpp", "int x;\n" * 1001, 1),
    ("tests/unit/test_a.py", lines(800), 0),
    ("tests/unit/test_a.py", lines(801), 1),
    ("core/a.py", function(100), 0),
    ("core/a.py", function(101), 1),
    ("core/a.py", branches(14), 0),
    ("core/a.py", branches(15), 1),
    ("core/a.py", arguments(8), 0),
    ("core/a.py", arguments(9), 1),
    ("core/a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h):\n        return 1\n", 0),
    ("core/a.py", "def f(a, b, c, d, *, e, f, g, h, i):\n    return 1\n", 1),
    ("kernels_cuda/a.py", arguments(20), 0),
    ("core/a.py", "def f(:\n", 1),
]


@pytest.mark.parametrize(("name", "text", "status"), SIZES)
def test_sizes_have_limits(tmp_path: Path, name: str, text: str, status: int) -> None:
    write(tmp_path, name, text)
    result = lint("size.py", tmp_path)
    assert result.returncode == status, result.stdout + result.stderr


def test_the_tail_is_printed_largest_first(tmp_path: Path) -> None:
    write(tmp_path, "core/short.py", lines(3))
    write(tmp_path, "core/long.py", lines(30))
    out = lint("size.py", tmp_path).stdout
    assert out.index("core/long.py") < out.index("core/short.py")
