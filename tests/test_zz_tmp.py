from tests.support.namespace import *
def test_a():
    with Namespace() as n:
        print(n.do("ls","-la","/run","/dev/fuse"), n.do("pwd","-P",user=True), n.do("id",user=True))
        require_user(n)
        n.do("mkdir","m",user=True); n.do("truncate","-s","1M","d.raw",user=True)
        d=n.cli("mount","--disk","d.raw",n.home/"m",user=True); print(d, n.mounts())
        print(n.cli("status",user=True))
        print(n.cli("status"))
        print(n.do("ls","-la","m",user=True))
        print(n.cli("umount","m",user=True))
        print(n.do("find",".",user=True))
    assert 0
