import { expect, test } from "vitest";
import { parseUri } from "../../provider/host/uri.ts";

const ssh = { host: "kvm1", proxy: "auto", netcat: "nc" };

test.each([
  ["qemu:///system", { driver: "qemu", scope: "system", localUri: "qemu:///system", mode: "auto" }],
  ["qemu:///session", { driver: "qemu", scope: "session", localUri: "qemu:///session", mode: "auto" }],
  ["test:///default", { driver: "test", scope: "system", localUri: "test:///default", mode: "auto" }],
  ["test:///etc/host.xml", { driver: "test", scope: "system", localUri: "test:///etc/host.xml", mode: "auto" }],
  [
    "qemu+unix:///system?socket=/run/my/libvirt-sock",
    { driver: "qemu", scope: "system", localUri: "qemu:///system", mode: "auto", socket: "/run/my/libvirt-sock" },
  ],
  ["qemu:///system?socket=/p&mode=legacy", { driver: "qemu", scope: "system", localUri: "qemu:///system", mode: "legacy", socket: "/p" }],
  ["qemu:///system?sudo=1", { driver: "qemu", scope: "system", localUri: "qemu:///system", mode: "auto", sudo: true }],
  ["qemu+ssh://kvm1/system", { driver: "qemu", scope: "system", localUri: "qemu:///system", mode: "auto", ssh }],
  ["qemu+libssh2://kvm1/session", { driver: "qemu", scope: "session", localUri: "qemu:///session", mode: "auto", ssh }],
  [
    "qemu+ssh://mover@kvm1:2222/system?keyfile=/k%20y+1&known_hosts=/h&known_hosts_verify=auto;proxy=netcat&netcat=/opt/nc&no_tty=1&sudo=0",
    {
      driver: "qemu",
      scope: "system",
      localUri: "qemu:///system",
      mode: "auto",
      sudo: false,
      ssh: {
        host: "kvm1",
        user: "mover",
        port: 2222,
        keyFile: "/k y+1",
        knownHostsFile: "/h",
        hostKeyPolicy: "accept-new",
        proxy: "netcat",
        netcat: "/opt/nc",
      },
    },
  ],
  [
    "qemu+ssh://a%40b@[fd00::1]:22/system",
    { driver: "qemu", scope: "system", localUri: "qemu:///system", mode: "auto", ssh: { ...ssh, host: "fd00::1", user: "a@b", port: 22 } },
  ],
])("understands %s", (uri, address) => {
  expect(parseUri(uri)).toEqual(address);
});

test.each([
  ["", "is none that is supported"],
  ["kvm1", "is none that is supported"],
  ["xen:///system", "is none that is supported"],
  ["qemu:///", 'neither "/system" nor "/session"'],
  ["qemu:///embed", 'neither "/system" nor "/session"'],
  ["test:///", "lacks the test driver's path"],
  ["qemu://kvm1/system", "means TCP or TLS, which is not supported: use qemu+ssh://"],
  ["qemu+tls://kvm1/system", "means TCP or TLS"],
  ["qemu+tcp://kvm1/system", "means TCP or TLS"],
  ["qemu+ext:///system?command=x", "unknown transport ext"],
  ["qemu+unix://kvm1/system", "names a host but is local"],
  ["qemu+ssh:///system", "names no host"],
  ["qemu+ssh://-oProxyCommand=x/system", "begins with a dash"],
  ["qemu+ssh://kvm1:0/system", "port that is not in 1 to 65535"],
  ["qemu+ssh://kvm1:99999/system", "port that is not in 1 to 65535"],
  ["qemu+ssh://kvm1/system?no_verify=1", 'set hostKeyPolicy to "accept-new"'],
  ["qemu+ssh://kvm1/system?known_hosts_verify=ignore", 'set hostKeyPolicy to "accept-new"'],
  ["qemu+ssh://kvm1/system?proxy=magic", "none of auto, native, netcat"],
  ["qemu+ssh://kvm1/system?proxy=native&socket=/p", "takes neither a netcat nor a socket"],
  ["qemu+ssh://kvm1/system?command=/bin/sh", "has the parameter command, which is not supported"],
  ["qemu:///system?keyfile=/k", "has the parameter keyfile"],
  ["qemu:///system?socket=relative", "no absolute path"],
  ["qemu:///system?socket=/a,exec:x", "no absolute path"],
  ["qemu+ssh://kvm1/system?keyfile=%zz", "wrong escape"],
])("refuses %s with one sentence", (uri, reason) => {
  expect(() => parseUri(uri)).toThrow(
    expect.objectContaining({ name: "ConnectionError", phase: "resolve", message: expect.stringContaining(reason) }),
  );
});

test("never repeats a password that stands in a URI", () => {
  expect(() => parseUri("qemu+ssh://root:geheim@kvm1/system")).toThrow(
    /^the host URI qemu\+ssh:\/\/root:\*\*\*@kvm1\/system holds a password/,
  );
  expect(() => parseUri("nonsense://root:geheim@kvm1/")).toThrow(
    expect.objectContaining({ message: expect.not.stringContaining("geheim") }),
  );
});
