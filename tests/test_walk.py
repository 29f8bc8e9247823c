import os
import time

def test_smoke(mounted, tmpfs_path):
    m = mounted({"a.raw": 1<<20, "b.raw": b"x"*4096}, directory=tmpfs_path)
    with m.events() as e:
        m.create("one")
        print(e.wait("FLEECEFS_SNAPSHOT_CREATED"))
    assert m.pid in m.processes() and m.keeper_pid in m.processes()
    m.remount()
    assert os.listdir(m.snapshots) == ["one"]
    m.delete("one")
    print(m.unexpected_log(), m.read_log())

def test_left_open(mounted):
    m = mounted({"a.raw": 1<<20, "b.raw": b"x"*4096})
    global f
    f = open(m.live("a.raw"))
def test_daemon_killed(mounted):
    m = mounted({"a.raw": 1<<20, "b.raw": b"x"*4096})
    os.kill(m.pid, 9)
def test_fails(mounted):
    m = mounted({"a.raw": 1<<20, "b.raw": b"x"*4096})
    with open(m.live("a.raw"), "r+b") as f:
        assert 0
