"""Programs that start in a process which has loaded TensorFlow already: 3 seconds of CPU less than `python ...` each.

The nursery, a process of one thread that has imported what the programs import and done nothing else, forks for each.
A fork is a child of the test's own process, has a program's arguments, environment, pipes and folder, and ends as a
program ends. Only its hash seed is the nursery's, and no time passes in which it imports TensorFlow.

    python tests/warm_start.py DESCRIPTOR        the nursery, at its end of a socket
"""

import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import types

_PRELOADED = ("PIL.Image", "bn_keras.training.trainer")
_PR_SET_CHILD_SUBREAPER = 36
_LARGEST_REQUEST = 1 << 17


class WarmProgram(subprocess.Popen):
    """A `Popen` of `python -m MODULE ...` or `python -c CODE ...`; its options are `cwd`, `env` and the pipes.

    Args:
      small: whether Inception has none of its ten modules: `shrink`.
    """

    def __init__(self, arguments, small, **options):
        self._small = small
        super().__init__(arguments, **options)

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *others,
    ):  # fmt: skip
        assert preexec_fn is None, "a warm program is not started by a fork of this process"
        request = json.dumps({"arguments": args, "cwd": str(cwd), "env": env, "small": self._small}).encode()
        channel, _ = _nursery()
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_CHILD_SUBREAPER, 1)  # a process whose parent ends becomes a child of this one
        try:
            socket.send_fds(channel, [request], [c2pwrite, errwrite])
            self.pid = int(channel.recv(64))
        finally:
            prctl(_PR_SET_CHILD_SUBREAPER, 0)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


@functools.cache
def _nursery():
    """The socket to this process's nursery, which ends with it, and the nursery."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        command = [sys.executable, __file__, str(other.fileno())]
        # OpenBLAS and pyarrow, which Keras loads by pandas, make threads when they are loaded; a fork has only one.
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        environment |= {"TF_CPP_MIN_LOG_LEVEL": "2"}
        process = subprocess.Popen(
            command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
        )
    return own, process


def _next_program(channel):
    """In a fork for each program: what the test asks for; returns in the forks only."""
    while True:
        content, streams, *_ = socket.recv_fds(channel, _LARGEST_REQUEST, 2)
        if not content:
            sys.exit()
        reader, writer = os.pipe()
        between = os.fork()
        if not between:
            program = os.fork()
            if not program:
                for descriptor in (channel.detach(), reader, writer):
                    os.close(descriptor)
                return json.loads(content), streams
            os.write(writer, str(program).encode())
            os._exit(0)
        os.waitpid(between, 0)  # now the program has another parent
        channel.send(os.read(reader, 64))
        for descriptor in (reader, writer, *streams):
            os.close(descriptor)


def shrink(set_attribute=setattr):
    """Leaves Figure 5's stem with its pools and none of its modules, 3 of 69 normalizations; and a ResNet three blocks.

    A run of Inception of some steps, most of which is tracing, then takes 7 seconds of CPU, not 11 as with one module.
    """
    from bn_keras.networks import inception, resnet

    set_attribute(inception, "FIGURE_5", ())
    set_attribute(resnet, "STAGES", dict.fromkeys(resnet.STAGES, (2, 1)))


def main(descriptor):
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"
    request, streams = _next_program(socket.socket(fileno=descriptor))
    for descriptor, stream in enumerate(streams, 1):
        os.dup2(stream, descriptor)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["small"]:
        shrink()
    kind, program, *arguments = request["arguments"]
    sys.argv[:] = [kind, *arguments]
    if kind == "-m":
        sys.path[0] = os.getcwd()
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
