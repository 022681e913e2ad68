//! Ranks that are processes: failures on demand, ranks that die, settings, addresses. A rank is this executable with a
//! variable that selects its role; the first one makes the id, and the test carries it to the others.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each passes a call the arguments that it declares, of memory that is there"
)]

mod support;

use std::ffi::{CStr, c_char, c_int};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use support::*;

const ROLE: &str = "NCCL_EMU_TEST_ROLE";
const RANK: &str = "NCCL_EMU_TEST_RANK";
const SIZE: &str = "NCCL_EMU_TEST_SIZE";
/// The id in hexadecimal digits; empty for the rank that makes it.
const ID: &str = "NCCL_EMU_TEST_ID";
/// The device, if it is not the rank's number.
const DEVICE: &str = "NCCL_EMU_TEST_DEVICE";

/// How long a rank that does not block waits before it gives up.
const PATIENCE: Duration = Duration::from_secs(2);

// What a rank does.

fn number(variable: &str) -> Option<usize> {
    std::env::var(variable).ok().map(|value| value.parse().expect(variable))
}

/// The id: of another process, or a new one, which is printed.
fn id() -> Id {
    let text = std::env::var(ID).expect(ID);
    if text.is_empty() {
        let id = unique_id();
        let text = id.0.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("a string takes everything");
            text
        });
        println!("ID {text}");
        return id;
    }
    let digits = |at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("hexadecimal digits");
    Id(std::array::from_fn(digits))
}

/// A rank, or what it was told instead.
fn open(blocking: c_int) -> Result<Rank, String> {
    let (rank, size, id) = (number(RANK).expect(RANK), number(SIZE).expect(SIZE), id());
    let (context, stream) = device(number(DEVICE).unwrap_or(rank));
    let mut comm = std::ptr::null_mut();
    let config = Config::new(blocking);
    let code = unsafe { (nccl().init_rank_config)(&mut comm, size as c_int, id, rank as c_int, &config) };
    let rank = Rank { rank, size, context, stream, comm, ended: false.into() };
    match (code, blocking) {
        (SUCCESS, 1) => Ok(rank),
        (IN_PROGRESS, 0) => settles(&rank).map(|()| rank),
        _ => Err(format!("{code} {}", last_error())),
    }
}

/// Waits for a rank that does not block, as long as it has patience, and then aborts.
fn settles(rank: &Rank) -> Result<(), String> {
    let start = Instant::now();
    loop {
        match rank.status() {
            SUCCESS => return Ok(()),
            IN_PROGRESS if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(1)),
            status => {
                let said = last_error_of(rank.comm);
                rank.abort();
                return Err(format!("{status} {said}"));
            }
        }
    }
}

/// The status of a communicator that is about to fail.
fn settles_on_a_failure(rank: &Rank) -> c_int {
    let start = Instant::now();
    while rank.status() == SUCCESS && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    rank.status()
}

/// Five sums, each printed with the time that it took; stops at the first failure.
fn sums(blocking: c_int) {
    let rank = match open(blocking) {
        Ok(rank) => rank,
        Err(why) => return println!("INIT {why}"),
    };
    for call in 1..=5 {
        let buffer = rank.upload(&numbers(rank.rank, 3));
        let start = Instant::now();
        let code = rank.all_reduce(rank.at(&buffer), rank.at(&buffer), 3, F32, SUM);
        let done = match code {
            SUCCESS => Ok(()),
            IN_PROGRESS => settles(&rank),
            _ => Err(format!("{code} {}", last_error())),
        };
        if let Err(why) = done {
            println!("FAILS {call} {why}");
            assert!(rank.read(&buffer).iter().all(|x| x.is_nan()), "what never arrives is NaN");
            return rank.abort();
        }
        println!("SUM {call} {} {:?}", start.elapsed().as_millis(), rank.read(&buffer));
    }
    rank.close();
    println!("OVER");
}

/// What a child process does; in the parent, where no role is set, there is nothing to do.
#[test]
fn roles() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    match role.as_str() {
        "sums" => sums(1),
        "patient sums" => sums(0),
        "leaves" => {
            let rank = open(1).unwrap();
            let buffer = rank.upload(&numbers(rank.rank, 3));
            assert_eq!(rank.all_reduce(rank.at(&buffer), rank.at(&buffer), 3, F32, SUM), SUCCESS);
            std::process::exit(3);
        }
        "late" => {
            let rank = open(1).unwrap();
            let buffer = rank.upload(&numbers(rank.rank, 3));
            assert_eq!(rank.all_reduce(rank.at(&buffer), rank.at(&buffer), 3, F32, SUM), SUCCESS);
            if rank.rank > 0 {
                // Rank 0, which has made the id, is gone by now.
                std::thread::sleep(Duration::from_millis(500));
                assert_eq!(rank.status(), SUCCESS, "{}", last_error_of(rank.comm));
            }
            if rank.rank == 2 {
                let code = rank.send(rank.at(&buffer), 3, 1);
                let code = if code == SUCCESS { settles_on_a_failure(&rank) } else { code };
                println!("FAILS 2 {code} {}", last_error_of(rank.comm));
                return rank.abort();
            }
            rank.close();
            println!("OVER");
        }
        "orders" => {
            let rank = open(1).unwrap();
            let buffer = rank.upload(&[[1e8f32, -1e8, 1.0][rank.rank]; 1000]);
            assert_eq!(rank.all_reduce(rank.at(&buffer), rank.at(&buffer), 1000, F32, SUM), SUCCESS);
            println!("SUMS {:?}", rank.read(&buffer));
            rank.close();
        }
        "version" => {
            let mut version = 0;
            let code = unsafe { (nccl().version)(&mut version) };
            println!("VERSION {code} {version} {}", last_error());
        }
        "open group" => {
            let rank = open(1).unwrap();
            let buffer = rank.upload(&numbers(rank.rank, 3));
            group_start();
            assert_eq!(rank.broadcast(rank.at(&buffer), rank.at(&buffer), 3, 0), SUCCESS);
        }
        "no driver" => {
            let nccl = unsafe { libloading::Library::new(library("libnccl_emu.so")) }.unwrap();
            type Init = unsafe extern "C" fn(*mut Handle, c_int, Id, c_int) -> c_int;
            let (unique, init, said) = unsafe {
                (
                    nccl.get::<unsafe extern "C" fn(*mut Id) -> c_int>(b"ncclGetUniqueId\0").unwrap(),
                    nccl.get::<Init>(b"ncclCommInitRank\0").unwrap(),
                    nccl.get::<unsafe extern "C" fn(Handle) -> *const c_char>(b"ncclGetLastError\0").unwrap(),
                )
            };
            let (mut id, mut comm) = (Id([0; 128]), std::ptr::null_mut());
            assert_eq!(unsafe { unique(&mut id) }, SUCCESS);
            let code = unsafe { init(&mut comm, 1, id, 0) };
            println!("INIT {code} {}", unsafe { CStr::from_ptr(said(comm)) }.to_str().unwrap());
        }
        "id" => {
            id();
        }
        role => panic!("no role {role}"),
    }
}

// How the test runs ranks.

type Variables<'a> = &'a [(&'a str, &'a str)];

/// A rank that is running.
struct Running {
    child: Child,
    out: BufReader<ChildStdout>,
}

/// A rank that has ended, and what it printed: lines in capitals are its own.
struct Ended {
    pid: u32,
    status: ExitStatus,
    lines: Vec<String>,
    stderr: String,
}

impl Ended {
    /// The lines that begin with a word, without it.
    fn said(&self, word: &str) -> Vec<&str> {
        self.lines.iter().filter_map(|line| line.strip_prefix(word)?.strip_prefix(' ')).collect()
    }

    #[track_caller]
    fn fails(&self, expected: &str, words: &str) {
        let said = self.said("FAILS");
        assert!(said.len() == 1, "{:?}\n{}", self.lines, self.stderr);
        assert!(said[0].starts_with(expected) && said[0].contains(words), "`{expected}`, `{words}`: {}", said[0]);
    }

    #[track_caller]
    fn is_over(&self) {
        assert!(self.status.success(), "{:?}\n{}", self.lines, self.stderr);
        assert!(self.lines.iter().any(|line| line == "OVER"), "{:?}\n{}", self.lines, self.stderr);
    }
}

/// Starts a rank. The last settings for a variable count.
fn start(role: &str, rank: usize, size: usize, id: &str, settings: &[Variables<'_>]) -> Running {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "roles", "--nocapture", "--test-threads", "1"]);
    command.env("NCCL_EMU_LOG", "errors").env(ROLE, role).env(ID, id);
    command.env(RANK, rank.to_string()).env(SIZE, size.to_string());
    for (name, value) in settings.iter().copied().flatten() {
        command.env(name, value);
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let out = BufReader::new(child.stdout.take().expect("it is piped"));
    Running { child, out }
}

impl Running {
    /// The next line that begins with a word, without it. Others are lost.
    fn line(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.out.read_line(&mut line).unwrap() > 0, "it ends without a line {word}");
            // The test harness has begun a line of its own.
            if let Some((_, rest)) = line.split_once(&format!("{word} ")) {
                return rest.trim_end().to_string();
            }
        }
    }

    /// Waits for the end, but not for ever.
    fn end(mut self) -> Ended {
        let (pid, start) = (self.child.id(), Instant::now());
        // A rank prints little, so that it never waits for a reader.
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < LONGEST, "process {pid} does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.child.wait().unwrap();
        let (mut out, mut stderr) = (String::new(), String::new());
        self.out.read_to_string(&mut out).unwrap();
        self.child.stderr.take().expect("it is piped").read_to_string(&mut stderr).unwrap();
        // "test roles ... " has no line end before the first line of a role.
        let lines = out.lines().map(|line| line.trim_start_matches("test roles ... ").to_string()).collect();
        Ended { pid, status, lines, stderr }
    }
}

impl Drop for Running {
    /// No process outlives its test.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `size` ranks with settings of their own beside those of all.
fn run(role: &str, size: usize, all: Variables<'_>, own: &[Variables<'_>]) -> Vec<Ended> {
    let of = |rank: usize| own.get(rank).copied().unwrap_or_default();
    let mut first = start(role, 0, size, "", &[all, of(0)]);
    let id = first.line("ID");
    let others: Vec<Running> = (1..size).map(|rank| start(role, rank, size, &id, &[all, of(rank)])).collect();
    std::iter::once(first).chain(others).collect::<Vec<_>>().into_iter().map(Running::end).collect()
}

const SUMS: &str = "[300.0, 303.0, 306.0]";

#[test]
fn processes_add_up() {
    for role in ["sums", "patient sums"] {
        for rank in run(role, 3, &[], &[]) {
            rank.is_over();
            let said = rank.said("SUM");
            assert!(said.len() == 5 && said.iter().all(|sum| sum.ends_with(SUMS)), "{said:?}");
            assert!(rank.stderr.is_empty(), "{}", rank.stderr);
        }
    }
}

#[test]
fn a_rank_that_is_killed_is_named() {
    let ranks = run("sums", 3, &[("NCCL_EMU_FAIL", "rank=1,call=3,as=kill")], &[]);
    assert_eq!(ranks[1].status.signal(), Some(9));
    assert_eq!(ranks[1].said("SUM").len(), 2);
    let words = format!("rank 1 (process {} on ", ranks[1].pid);
    for rank in [&ranks[0], &ranks[2]] {
        assert_eq!(rank.said("SUM").len(), 2);
        rank.fails("3 6 ", &words);
        rank.fails("3 6 ", ") is gone, without having ended its communicator");
        assert!(rank.stderr.contains(&words), "{}", rank.stderr);
    }
}

/// The process that made the id is killed. What it had yet to deliver of the call before is lost with it.
#[test]
fn the_first_rank_is_killed() {
    let ranks = run("sums", 3, &[("NCCL_EMU_FAIL", "rank=0,call=2,as=kill")], &[]);
    assert_eq!(ranks[0].status.signal(), Some(9));
    for rank in &ranks[1..] {
        let call = rank.said("SUM").len() + 1;
        assert!(call == 1 || call == 2, "{:?}", rank.lines);
        rank.fails(&format!("{call} 6 "), &format!("process {} on ", ranks[0].pid));
        rank.fails(&format!("{call} 6 "), ", in which the ranks meet, is gone");
    }
}

/// As within a machine: nobody is told, and only patience ends it.
#[test]
fn a_rank_that_is_killed_silently() {
    for killed in [0, 1] {
        let fail = format!("rank={killed},call=3,as=kill");
        let settings = [("NCCL_EMU_FAIL", &fail[..]), ("NCCL_EMU_PEERS", "hang")];
        let ranks = run("patient sums", 3, &settings, &[]);
        assert_eq!(ranks[killed].status.signal(), Some(9));
        for (_, rank) in ranks.iter().enumerate().filter(|(rank, _)| *rank != killed) {
            // Of the process in which the ranks meet the call before may be lost.
            let call = rank.said("SUM").len() + 1;
            assert!(call == 3 || call == 2 && killed == 0, "{:?}", rank.lines);
            rank.fails(&format!("{call} 7"), "");
        }
    }
}

#[test]
fn a_rank_that_hangs() {
    let ranks = run("patient sums", 2, &[("NCCL_EMU_FAIL", "rank=1,call=2,as=hang")], &[]);
    // Whoever gives up first aborts, of which the other may learn.
    let said: Vec<&str> = ranks.iter().flat_map(|rank| rank.said("FAILS")).collect();
    assert!(said.len() == 2 && said.iter().all(|why| why.starts_with("2 7") || why.starts_with("2 6")), "{said:?}");
    assert!(said.iter().any(|why| why.starts_with("2 7")), "{said:?}");
}

#[test]
fn a_rank_that_fails() {
    let ranks = run("sums", 2, &[("NCCL_EMU_FAIL", "rank=1,call=4,as=error")], &[]);
    ranks[1].fails("4 2 ", "rank 1 fails at call 4, as NCCL_EMU_FAIL asks");
    ranks[0].fails("4 6 ", ") has aborted its communicator");
}

#[test]
fn a_rank_that_is_slow() {
    let ranks = run("patient sums", 2, &[("NCCL_EMU_FAIL", "rank=1,call=2,as=slow:700ms")], &[]);
    for rank in &ranks {
        rank.is_over();
        let times: Vec<u64> =
            rank.said("SUM").iter().map(|sum| sum.split(' ').nth(1).unwrap().parse().unwrap()).collect();
        // Rank 0 may have been a little late itself.
        assert!(times[1] >= 500, "{times:?}");
    }
}

#[test]
fn a_rank_that_gets_wrong_data() {
    let ranks = run("sums", 2, &[("NCCL_EMU_FAIL", "rank=1,call=2,as=corrupt;rank=0,call=4,as=corrupt")], &[]);
    let right = "[100.0, 102.0, 104.0]";
    let wrong = format!("{:?}", [f32::from_bits(100.0f32.to_bits() ^ 1 << 22), 102.0, 104.0]);
    for (rank, of) in ranks.iter().zip([4, 2]) {
        rank.is_over();
        for (call, sum) in rank.said("SUM").iter().enumerate() {
            let expected = if call + 1 == of { &wrong[..] } else { right };
            assert!(sum.ends_with(expected), "call {}, expected {expected}: {sum}", call + 1);
        }
    }
}

/// One rank fails to connect, and the other waits for it.
#[test]
fn a_rank_that_never_arrives() {
    let ranks = run("patient sums", 2, &[("NCCL_EMU_FAIL", "rank=1,call=0,as=error")], &[]);
    assert_eq!(ranks[0].said("INIT"), ["7 "]);
    assert_eq!(ranks[1].said("INIT"), ["2 rank 1 fails at call 0, as NCCL_EMU_FAIL asks"]);
}

#[test]
fn a_process_that_leaves_without_an_end() {
    let mut first = start("sums", 0, 2, "", &[]);
    let id = first.line("ID");
    let other = start("leaves", 1, 2, &id, &[]);
    let (first, other) = (first.end(), other.end());
    assert_eq!(other.status.code(), Some(3));
    // It leaves in its first call or behind it.
    let in_first = first.said("FAILS").iter().any(|said| said.starts_with("1 "));
    first.fails(if in_first { "1 6 " } else { "2 6 " }, &format!("rank 1 (process {} on ", other.pid));
}

/// The process that made the id ends first, as it may when its own part is over.
#[test]
fn the_first_process_ends_first() {
    let ranks = run("late", 3, &[], &[]);
    ranks[0].is_over();
    ranks[1].is_over();
    ranks[2].fails("2 5 rank 2 sends 3 f32 to rank 1 in its call 2, but other ranks have ended their part", "");
}

/// Another seed adds in another order: all ranks get the same bits, and other ones than before.
#[test]
fn a_seed_draws_the_order() {
    let sums = |seed| {
        let ranks = run("orders", 3, &[("NCCL_EMU_SEED", seed)], &[]);
        let said: Vec<String> = ranks.iter().map(|rank| rank.said("SUMS").concat()).collect();
        assert!(said[0].len() > 1000 && said.iter().all(|sums| *sums == said[0]), "{said:?}");
        said[0].clone()
    };
    assert_eq!(sums("1"), sums("1"));
    assert_ne!(sums("1"), sums("2"));
}

#[test]
fn ranks_with_other_versions() {
    let ranks = run("patient sums", 2, &[], &[&[], &[("NCCL_EMU_VERSION", "2.14.0")]]);
    for rank in &ranks {
        let said = rank.said("INIT").concat();
        let either = ["rank 0 has NCCL 2.30.3, rank 1 NCCL 2.14.0", "rank 1 has NCCL 2.14.0, rank 0 NCCL 2.30.3"];
        assert!(said.starts_with("5 ") && either.iter().any(|words| said.ends_with(words)), "{said}");
    }
}

#[test]
fn versions_are_as_asked() {
    let version = |settings: Variables<'_>| start("version", 0, 1, "", &[settings]).end().said("VERSION").concat();
    assert_eq!(version(&[]), "0 23003 ");
    assert_eq!(version(&[("NCCL_EMU_VERSION", "2.13.4")]), "0 21304 ");
    let said = version(&[("NCCL_EMU_FAIL", "rank=1")]);
    assert!(said.starts_with("4 0 NCCL_EMU_FAIL=rank=1: it must name a call by its number"), "{said}");
}

#[test]
fn ranks_that_share_a_gpu() {
    let one: [Variables<'_>; 2] = [&[(DEVICE, "1")]; 2];
    for rank in run("patient sums", 2, &[], &one) {
        let said = rank.said("INIT").concat();
        assert!(said.starts_with("5 ") && said.contains(" both use GPU 1 of "), "{said}");
    }
    run("sums", 2, &[("NCCL_MULTI_RANK_GPU_ENABLE", "1")], &one).iter().for_each(Ended::is_over);
    // Both must know.
    let only_one: [Variables<'_>; 2] = [&[(DEVICE, "1")], &[(DEVICE, "1"), ("NCCL_MULTI_RANK_GPU_ENABLE", "1")]];
    for rank in run("patient sums", 2, &[], &only_one) {
        assert!(rank.said("INIT").concat().contains(" both use GPU 1 of "), "{:?}", rank.lines);
    }
    // GPU 1 of another machine is another one.
    let machines: [Variables<'_>; 2] =
        [&[(DEVICE, "1"), ("NCCL_HOSTID", "left")], &[(DEVICE, "1"), ("NCCL_HOSTID", "right")]];
    run("sums", 2, &[], &machines).iter().for_each(Ended::is_over);
}

#[test]
fn a_group_left_open_is_reported() {
    let ended = start("open group", 0, 1, "", &[]).end();
    assert!(ended.status.success());
    let words = " has a group open: its 1 calls have never run\n";
    assert!(ended.stderr.contains("nccl_emu: the process ends while ThreadId(") && ended.stderr.contains(words));
    let silent = start("open group", 0, 1, "", &[&[("NCCL_EMU_LOG", "none")]]).end();
    assert!(!silent.stderr.contains(words), "{}", silent.stderr);
}

#[test]
fn a_process_without_a_driver() {
    let said = start("no driver", 0, 1, "", &[]).end().said("INIT").concat();
    assert_eq!(said, "1 no CUDA driver is loaded in this process (libcuda.so or libcuda.so.1)");
}

#[test]
fn calls_are_named_when_asked() {
    let ended = start("sums", 0, 1, "", &[&[("NCCL_EMU_LOG", "calls")]]).end();
    ended.is_over();
    for line in ["nccl_emu: ncclAllReduce\n", "nccl_emu: rank 0 all-reduces 3 f32 (sum) in its call 5\n"] {
        assert!(ended.stderr.contains(line), "{line} is not in: {}", ended.stderr);
    }
}

/// Where ranks meet: at the first address of the list that is this machine's.
#[test]
fn ids_are_made_at_the_address_asked_for() {
    let made = |settings: Variables<'_>| {
        let mut running = start("id", 0, 1, "", &[settings]);
        let id = running.line("ID");
        assert!(running.end().status.success());
        id
    };
    // 127.0.0.1 as an IPv6 address, from the 24th byte of the id on.
    assert!(made(&[])[48..].starts_with("00000000000000000000ffff7f000001"));
    let list = [("NCCL_EMU_ADDRESS", "10.255.254.253, 127.0.0.3")];
    assert!(made(&list)[48..].starts_with("00000000000000000000ffff7f000003"));
    run("sums", 2, &[("NCCL_EMU_ADDRESS", "127.0.0.2")], &[]).iter().for_each(Ended::is_over);
}
