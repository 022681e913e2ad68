//! The variables that this library reads, once in a process: its own `NCCL_EMU_*`, and two of NCCL's.

use std::ffi::c_int;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::OnceLock;
use std::time::Duration;

use crate::codes::{Answer, Code, refusal};

/// What goes to stderr.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Log {
    /// Nothing.
    None,
    /// Each refusal and each failure of a communicator.
    Errors,
    /// Each exported function and each call that is carried out, too.
    Calls,
}

/// The level of logging; other settings may be wrong.
pub fn log() -> Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    *LOG.get_or_init(|| match std::env::var("NCCL_EMU_LOG").as_deref() {
        Ok("none") => Log::None,
        Ok("calls") => Log::Calls,
        _ => Log::Errors,
    })
}

/// What the ranks see of one that has died.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peers {
    /// Their calls fail, as NCCL's may over a network.
    Error,
    /// Nothing: their calls wait for ever, as NCCL's do within a machine.
    Hang,
}

/// A failure on demand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Planned {
    /// In which rank.
    pub rank: u32,
    /// At which of its calls, counted from 1; 0 is the making of its communicator.
    pub call: u64,
    pub what: Failure,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The process kills itself with SIGKILL.
    Kill,
    /// The call never ends.
    Hang,
    /// The communicator gets an error.
    Error,
    /// The call begins late.
    Slow(Duration),
    /// A bit of what the call receives, or else of what it sends, is wrong.
    Corrupt,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// NCCL_EMU_ADDRESS: where ranks may meet, if not at a loopback address: addresses of a private network.
    pub addresses: Vec<IpAddr>,
    /// NCCL_EMU_FAIL.
    pub failures: Vec<Planned>,
    /// NCCL_EMU_PEERS.
    pub peers: Peers,
    /// NCCL_EMU_SEED: draws the order in which numbers are added.
    pub seed: u64,
    /// NCCL_EMU_VERSION, as NCCL encodes it.
    pub version: c_int,
    /// NCCL_MULTI_RANK_GPU_ENABLE: several ranks may use one GPU.
    pub several_ranks_per_gpu: bool,
    /// NCCL_HOSTID: the name of this machine, for telling GPUs of the same number apart.
    pub host_id: Option<String>,
}

/// The settings of this process.
pub fn settings() -> Answer<&'static Settings> {
    static SETTINGS: OnceLock<Result<Settings, String>> = OnceLock::new();
    let read = SETTINGS.get_or_init(|| Settings::from_variables(|name| std::env::var(name).ok()));
    read.as_ref().map_err(|why| refusal(Code::ARGUMENT, why.clone()))
}

impl Settings {
    /// An error is a sentence that names the variable, its value and what would be valid.
    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Settings, String> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let read = |name: &str| variable(name).unwrap_or_default();
        let addresses = match variable("NCCL_EMU_ADDRESS") {
            None => vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
            Some(list) => {
                let near = list.split(',').map(|address| address.trim().parse().ok().filter(is_near));
                near.collect::<Option<_>>().ok_or_else(|| {
                    format!(
                        "NCCL_EMU_ADDRESS={list}: it must be a loopback address or one of a private network, such as \
                         10.0.0.1, or a list of them: this library is for tests on one machine"
                    )
                })?
            }
        };
        let peers = match &read("NCCL_EMU_PEERS")[..] {
            "" | "error" => Peers::Error,
            "hang" => Peers::Hang,
            value => return Err(format!("NCCL_EMU_PEERS={value}: it must be error or hang")),
        };
        let seed = match variable("NCCL_EMU_SEED") {
            None => 0,
            Some(value) => value.parse().map_err(|_| format!("NCCL_EMU_SEED={value}: it must be a whole number"))?,
        };
        let version = match variable("NCCL_EMU_VERSION") {
            None => 23003,
            Some(value) => version(&value)
                .ok_or_else(|| format!("NCCL_EMU_VERSION={value}: it must be a version of NCCL, such as 2.30.3"))?,
        };
        let failures = read("NCCL_EMU_FAIL");
        let failures = failures.split(';').filter(|part| !part.trim().is_empty()).map(planned);
        Ok(Settings {
            addresses,
            failures: failures.collect::<Result<_, _>>()?,
            peers,
            seed,
            version,
            several_ranks_per_gpu: read("NCCL_MULTI_RANK_GPU_ENABLE") == "1",
            host_id: variable("NCCL_HOSTID"),
        })
    }
}

/// True for an address that no packet leaves a private network for.
fn is_near(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local(),
    }
}

/// `2.30.3` as 23003, and `2.8.4` as 2804.
fn version(text: &str) -> Option<c_int> {
    let parts: Vec<c_int> = text.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
    match parts[..] {
        [major @ 1..=9, minor @ 0..=99, patch @ 0..=99] => {
            let old = major <= 2 && minor <= 8;
            Some(if old { 1000 * major } else { 10_000 * major } + 100 * minor + patch)
        }
        _ => None,
    }
}

/// A version as NCCL encodes it, in words.
pub fn dotted(version: c_int) -> String {
    let unit = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / unit, version % unit / 100, version % 100)
}

/// `rank=1,call=17,as=kill`.
fn planned(text: &str) -> Result<Planned, String> {
    let wrong = |why: &str| format!("NCCL_EMU_FAIL={text}: {why}, as in rank=1,call=17,as=kill");
    let (mut rank, mut call, mut what) = (None, None, None);
    for part in text.split(',').map(str::trim) {
        match part.split_once('=') {
            Some(("rank", value)) => rank = value.parse().ok(),
            Some(("call", value)) => call = value.parse().ok(),
            Some(("as", value)) => what = failure(value),
            _ => return Err(wrong("each part must be rank=R, call=N or as=WHAT")),
        }
    }
    Ok(Planned {
        rank: rank.ok_or_else(|| wrong("it must name a rank"))?,
        call: call.ok_or_else(|| wrong("it must name a call by its number"))?,
        what: what.ok_or_else(|| wrong("it must say as=kill, hang, error, slow:2s or corrupt"))?,
    })
}

fn failure(text: &str) -> Option<Failure> {
    match text {
        "kill" => Some(Failure::Kill),
        "hang" => Some(Failure::Hang),
        "error" => Some(Failure::Error),
        "corrupt" => Some(Failure::Corrupt),
        _ => duration(text.strip_prefix("slow:")?).map(Failure::Slow),
    }
}

/// `2s` or `500ms`.
fn duration(text: &str) -> Option<Duration> {
    match text.strip_suffix("ms") {
        Some(number) => number.parse().ok().map(Duration::from_millis),
        None => text.strip_suffix('s')?.parse().ok().map(Duration::from_secs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> Result<Settings, String> {
        let find = |name: &str| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_string());
        Settings::from_variables(find)
    }

    #[test]
    fn variables_are_read() {
        let nothing = with(&[]).unwrap();
        assert_eq!((nothing.addresses, nothing.peers), (vec![IpAddr::V4(Ipv4Addr::LOCALHOST)], Peers::Error));
        assert_eq!((nothing.seed, nothing.version, nothing.several_ranks_per_gpu), (0, 23003, false));
        assert!(nothing.failures.is_empty() && nothing.host_id.is_none());
        let all = with(&[
            ("NCCL_EMU_ADDRESS", "10.9.0.1, fd00::2"),
            ("NCCL_EMU_FAIL", "rank=1,call=17,as=kill; rank=0, call=0, as=slow:500ms;rank=2,call=3,as=slow:2s"),
            ("NCCL_EMU_PEERS", "hang"),
            ("NCCL_EMU_SEED", "7"),
            ("NCCL_EMU_VERSION", "2.13.4"),
            ("NCCL_MULTI_RANK_GPU_ENABLE", "1"),
            ("NCCL_HOSTID", "left"),
        ]);
        let slow = |millis| Failure::Slow(Duration::from_millis(millis));
        let expected = Settings {
            addresses: vec!["10.9.0.1".parse().unwrap(), "fd00::2".parse().unwrap()],
            failures: vec![
                Planned { rank: 1, call: 17, what: Failure::Kill },
                Planned { rank: 0, call: 0, what: slow(500) },
                Planned { rank: 2, call: 3, what: slow(2000) },
            ],
            peers: Peers::Hang,
            seed: 7,
            version: 21304,
            several_ranks_per_gpu: true,
            host_id: Some("left".into()),
        };
        assert_eq!(all, Ok(expected));
    }

    #[test]
    fn what_cannot_be_right_is_refused_by_name() {
        for (name, value) in [
            ("NCCL_EMU_ADDRESS", "8.8.8.8"),
            ("NCCL_EMU_ADDRESS", "0.0.0.0"),
            ("NCCL_EMU_ADDRESS", "example.org"),
            ("NCCL_EMU_ADDRESS", "10.0.0.1,8.8.8.8"),
            ("NCCL_EMU_FAIL", "rank=1,as=kill"),
            ("NCCL_EMU_FAIL", "rank=1,call=2"),
            ("NCCL_EMU_FAIL", "call=2,as=hang"),
            ("NCCL_EMU_FAIL", "rank=1,call=2,as=explode"),
            ("NCCL_EMU_FAIL", "rank=1,call=2,as=slow:2"),
            ("NCCL_EMU_FAIL", "rank=-1,call=2,as=kill"),
            ("NCCL_EMU_FAIL", "rank=1,call=2,as=kill,now"),
            ("NCCL_EMU_PEERS", "wait"),
            ("NCCL_EMU_SEED", "-1"),
            ("NCCL_EMU_VERSION", "2.30"),
        ] {
            let message = with(&[(name, value)]).expect_err(value);
            assert!(message.starts_with(&format!("{name}={value}: ")), "{message}");
        }
    }

    #[test]
    fn versions_are_encoded_as_nccl_does() {
        for (text, number) in [("2.8.4", 2804), ("2.9.6", 20906), ("2.14.0", 21400), ("2.30.3", 23003)] {
            assert_eq!(version(text), Some(number), "{text}");
            assert_eq!(dotted(number), text);
        }
    }
}
