//! How much of the host's memory this process can still use on Linux: the smallest of what the kernel calls available,
//! what the limits of its control groups leave, and what the limits of `ulimit` leave.
//!
//! The page cache counts as usable: the kernel gives it up when a process needs memory. MemAvailable of /proc/meminfo
//! contains it (proc(5), "MemAvailable"). A control group's usage contains it too, so its pages, `inactive_file` and
//! `active_file` of memory.stat, are subtracted (the kernel's cgroup-v2.rst and cgroup-v1/memory.rst, "memory.stat").
//! Files in memory (tmpfs) are not among those counters and cannot be given up. Reclaimable slab, which the kernel can
//! free as well, is not subtracted: it is small, and version 1 does not report it.
//!
//! sysinfo's figures for control groups are not used: they subtract the whole usage, page cache included, and know only
//! the group that is mounted at /sys/fs/cgroup.

/// Bytes of memory, by the texts of the kernel's files. `read` returns that of a path, if it exists. `None` if a file
/// that must exist does not, or a limit cannot be understood.
pub fn available(read: &dyn Fn(&str) -> Option<String>) -> Option<u64> {
    let mut least = field(&read("/proc/meminfo")?, "MemAvailable:")?.saturating_mul(1024);
    for (group, version) in control_groups(read) {
        if let Some(room) = room(read, &group, version)? {
            least = least.min(room);
        }
    }
    // `ulimit -v` and `ulimit -d` (getrlimit(2), RLIMIT_AS and RLIMIT_DATA), which some clusters set instead of the
    // limit of a group. Memory that is mapped and never touched counts.
    if let (Some(limits), Some(status)) = (read("/proc/self/limits"), read("/proc/self/status")) {
        for (limit, used) in [("Max address space", "VmSize:"), ("Max data size", "VmData:")] {
            if let (Some(limit), Some(used)) = (field(&limits, limit), field(&status, used)) {
                least = least.min(limit.saturating_sub(used.saturating_mul(1024)));
            }
        }
    }
    Some(least)
}

/// The number behind `name` in lines of names and numbers.
fn field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name).filter(|rest| rest.starts_with([' ', '\t'])))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Version of the interface of control groups (cgroups(7)).
#[derive(Clone, Copy, Debug, PartialEq)]
enum Version {
    V1,
    V2,
}

/// Folders of the memory groups that this process is in, with all their ancestors, since the limit of each holds.
fn control_groups(read: &dyn Fn(&str) -> Option<String>) -> Vec<(String, Version)> {
    let (Some(groups), Some(mounts)) = (read("/proc/self/cgroup"), read("/proc/self/mountinfo")) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    // ID:CONTROLLERS:PATH; version 2 has no controllers there.
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let version = match controllers {
            "" => Version::V2,
            list if list.split(',').any(|controller| controller == "memory") => Version::V1,
            _ => continue,
        };
        let Some((root, mounted_at)) = mounts.lines().find_map(|line| mount(line, version)) else { continue };
        // A container may see only a part of the tree: its root. What lies outside cannot be looked at.
        let root = root.trim_end_matches('/');
        let below = path.strip_prefix(root).filter(|rest| rest.is_empty() || rest.starts_with('/')).unwrap_or("");
        let mut below = if below.contains("/..") { "" } else { below.trim_end_matches('/') };
        loop {
            found.push((format!("{}{below}", mounted_at.trim_end_matches('/')), version));
            let Some(parent) = below.rfind('/') else { break };
            below = &below[..parent];
        }
    }
    found
}

/// The root and the mount point of a line of mountinfo (proc_pid_mountinfo(5)) if it mounts that hierarchy.
fn mount(line: &str, version: Version) -> Option<(&str, &str)> {
    let (mount, system) = line.split_once(" - ")?;
    let mut system = system.split(' ');
    let (kind, options) = (system.next()?, system.nth(1)?);
    let wanted = match version {
        Version::V1 => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
        Version::V2 => kind == "cgroup2",
    };
    let mut fields = mount.split(' ').skip(3);
    wanted.then_some((fields.next()?, fields.next()?))
}

/// What the limit of a group leaves: `Some(None)` if it has no limit, `None` if that cannot be understood.
fn room(read: &dyn Fn(&str) -> Option<String>, group: &str, version: Version) -> Option<Option<u64>> {
    // Beyond memory.high the kernel ends no process, but slows it down to a crawl.
    let (limits, usage, cached): (&[_], _, _) = match version {
        Version::V1 => {
            (&["memory.limit_in_bytes"], "memory.usage_in_bytes", ["total_inactive_file", "total_active_file"])
        }
        Version::V2 => (&["memory.max", "memory.high"], "memory.current", ["inactive_file", "active_file"]),
    };
    let number = |name: &str| read(&format!("{group}/{name}")).map(|text| text.trim().parse::<u64>());
    let mut limit = None;
    for name in limits {
        // The root group has no such file.
        let Some(text) = read(&format!("{group}/{name}")) else { continue };
        if text.trim() != "max" {
            let this = text.trim().parse::<u64>().ok()?;
            limit = Some(limit.map_or(this, |limit: u64| limit.min(this)));
        }
    }
    let Some(limit) = limit else { return Some(None) };
    let used = number(usage)?.ok()?;
    let stat = read(&format!("{group}/memory.stat")).unwrap_or_default();
    let cached = cached.iter().filter_map(|name| field(&stat, name)).fold(0, u64::saturating_add);
    Some(Some(limit.saturating_sub(used.saturating_sub(cached))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MEMINFO: &str =
        "MemTotal:       24684084 kB\nMemFree:         8279896 kB\nMemAvailable:   21670716 kB\nCached: 1 kB\n";
    const MEMORY: u64 = 1024 * 21_670_716;
    const V2_MOUNT: &str =
        "35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1_MOUNT: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    /// What is available by these files and /proc/meminfo.
    fn by(files: &[(&str, &str)]) -> Option<u64> {
        available(&|path| match files.iter().find(|(name, _)| *name == path) {
            Some((_, text)) => Some(text.to_string()),
            None => (path == "/proc/meminfo").then(|| MEMINFO.into()),
        })
    }

    #[test]
    fn without_a_limit_it_is_what_the_kernel_calls_available() {
        assert_eq!(by(&[]), Some(MEMORY));
        let v2 = [
            ("/proc/self/cgroup", "0::/user.slice/session-1.scope\n"),
            ("/proc/self/mountinfo", V2_MOUNT),
            ("/sys/fs/cgroup/user.slice/memory.max", "max\n"),
            ("/sys/fs/cgroup/user.slice/memory.high", "max\n"),
            ("/sys/fs/cgroup/user.slice/memory.current", "14000000000\n"),
            ("/sys/fs/cgroup/user.slice/session-1.scope/memory.max", "max\n"),
        ];
        assert_eq!(by(&v2), Some(MEMORY));
        // Version 1 writes the largest multiple of the page size. Beside it version 2 is mounted without controllers.
        let v1 = [
            ("/proc/self/cgroup", "9:name=systemd:/\n4:memory:/job/5\n1:cpu:/\n0::/\n"),
            ("/proc/self/mountinfo", V1_MOUNT),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "15000000000\n"),
        ];
        assert_eq!(by(&v1), Some(MEMORY));
    }

    #[test]
    fn every_ancestor_of_a_group_limits_it_and_the_page_cache_is_no_usage() {
        let outer = "anon 1073741824\ninactive_file_dirty 7\nfile 9663676416\ninactive_file 8589934592\n\
            active_file 536870912\nshmem 536870912\n";
        let mut files = vec![
            ("/proc/self/cgroup", "0::/slice/job/step\n"),
            ("/proc/self/mountinfo", V2_MOUNT),
            ("/sys/fs/cgroup/slice/memory.max", "12884901888"),
            ("/sys/fs/cgroup/slice/memory.current", "11811160064"),
            ("/sys/fs/cgroup/slice/memory.stat", outer),
            ("/sys/fs/cgroup/slice/job/memory.max", "max"),
            ("/sys/fs/cgroup/slice/job/step/memory.max", "17179869184"),
            ("/sys/fs/cgroup/slice/job/step/memory.current", "0"),
        ];
        // 12 GiB of which 11 are used, 8.5 of those by the cache.
        assert_eq!(by(&files), Some(12 * GIB - (11 * GIB - 8 * GIB - GIB / 2)));
        files.push(("/sys/fs/cgroup/slice/job/memory.high", "2147483648"));
        files.push(("/sys/fs/cgroup/slice/job/memory.current", "3221225472"));
        files.push(("/sys/fs/cgroup/slice/job/memory.stat", "inactive_file 2147483648\n"));
        assert_eq!(by(&files), Some(GIB), "memory.high of the group between");
        files.retain(|(name, _)| !name.ends_with("memory.current"));
        assert_eq!(by(&files), None, "a limit without a usage");
    }

    #[test]
    fn version_1_counts_what_is_below_the_group_too() {
        let files = [
            ("/proc/self/cgroup", "4:cpu,memory:/job/5\n"),
            ("/proc/self/mountinfo", "35 31 0:32 /job /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu,memory\n"),
            ("/sys/fs/cgroup/memory/5/memory.limit_in_bytes", "8589934592\n"),
            ("/sys/fs/cgroup/memory/5/memory.usage_in_bytes", "6442450944\n"),
            (
                "/sys/fs/cgroup/memory/5/memory.stat",
                "inactive_file 1\nactive_file 1\ntotal_inactive_file 4294967296\ntotal_active_file 1073741824\n",
            ),
        ];
        assert_eq!(by(&files), Some(7 * GIB));
    }

    #[test]
    fn a_container_sees_the_limit_of_its_own_root() {
        // With a namespace of its own, without one, and with a path that leads out of what is mounted.
        for (group, root) in
            [("/", "/"), ("/docker/abc", "/docker/abc"), ("/../other", "/"), ("/docker/abcdef", "/docker/abc")]
        {
            let mounts = format!("35 24 0:30 {root} /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
            let groups = format!("0::{group}\n");
            let files = [
                ("/proc/self/cgroup", &groups[..]),
                ("/proc/self/mountinfo", &mounts),
                ("/sys/fs/cgroup/memory.max", "1073741824"),
                ("/sys/fs/cgroup/memory.current", "268435456"),
            ];
            assert_eq!(by(&files), Some(GIB * 3 / 4), "{group} below {root}");
        }
    }

    #[test]
    fn what_cannot_be_understood_is_unknown_and_not_unlimited() {
        let with = |limit, usage| {
            by(&[
                ("/proc/self/cgroup", "0::/\nnonsense\n1:\n"),
                ("/proc/self/mountinfo", &format!("short\n1 - cgroup2\n{V2_MOUNT}")),
                ("/sys/fs/cgroup/memory.max", limit),
                ("/sys/fs/cgroup/memory.current", usage),
            ])
        };
        assert_eq!(with("4096", "8192"), Some(0), "over its limit");
        let huge = format!("MemAvailable: {} kB\n", u64::MAX);
        assert_eq!(available(&|path| (path == "/proc/meminfo").then(|| huge.clone())), Some(u64::MAX));
        assert_eq!(with("", "0"), None);
        assert_eq!(with("-1", "0"), None);
        assert_eq!(with("1073741824", "much"), None);
        for text in ["", "MemAvailable:\n", "MemAvailable: much kB\n", "MemAvailableX: 3 kB\n"] {
            assert_eq!(available(&|path| (path == "/proc/meminfo").then(|| text.into())), None, "{text:?}");
        }
        assert_eq!(available(&|_| None), None);
    }

    #[test]
    fn limits_of_the_shell_count() {
        let status = "VmPeak:\t 9 kB\nVmSize:\t 1048576 kB\nVmData:\t  524288 kB\n";
        let with = |limits| by(&[("/proc/self/limits", limits), ("/proc/self/status", status)]);
        let unlimited = "Limit                     Soft Limit           Hard Limit           Units\n\
            Max data size             unlimited            unlimited            bytes\n\
            Max address space         unlimited            unlimited            bytes\n";
        assert_eq!(with(unlimited), Some(MEMORY));
        assert_eq!(with("Max address space         4294967296           unlimited            bytes\n"), Some(3 * GIB));
        assert_eq!(with("Max data size             1073741824           unlimited            bytes\n"), Some(GIB / 2));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_says_how_much_there_is() {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
        let total = 1024 * field(&meminfo, "MemTotal:").unwrap();
        let available = crate::device::cpu::available_memory().unwrap();
        assert!((1 << 20..total).contains(&available), "{available} of {total}");
    }
}
