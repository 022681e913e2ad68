//! Ranks meet, watch each other and end: as threads of this process, over real connections. `tests/launch.rs` has them
//! as processes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ddpm_cuda::distributed::message::{Decoder, Hello, Message, PROTOCOL, head, opening};
use ddpm_cuda::distributed::{Control, Fact, Joining, Stop, Timeouts, Who, World};
use ddpm_cuda::error::{Error, Result};

const SECRET: &str = "a secret";

/// A meeting point on this machine, and the socket there.
fn meeting_point() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Short waits where a test is about their end; otherwise none should come to it on a machine that is busy.
fn patient() -> Timeouts {
    let join = Duration::from_secs(60);
    Timeouts { join, silence: join, wait: join, grace: join }
}

fn joining(rank: usize, size: usize, port: u16) -> Joining {
    let world =
        World { rank, size, local_rank: rank, local_size: Some(size), address: Ipv4Addr::LOCALHOST.to_string(), port };
    Joining {
        world,
        listener: None,
        token: Some(SECRET.into()),
        host: "here".into(),
        device: "CPU".into(),
        facts: vec![Fact::new("steps", 7)],
        timeouts: patient(),
        cancelled: Arc::new(AtomicBool::new(false)),
        last_resort: None,
    }
}

/// What each of `size` ranks comes to, each on a thread. `change` makes a rank's joining other than the usual.
fn ranks<T: Send>(
    size: usize,
    change: impl Fn(&mut Joining) + Sync,
    work: impl Fn(Result<(Control, Vec<String>)>) -> T + Sync,
) -> Vec<T> {
    let (listener, port) = meeting_point();
    let mut listener = Some(listener);
    thread::scope(|scope| {
        let started: Vec<_> = (0..size)
            .map(|rank| {
                let mut joining = joining(rank, size, port);
                joining.listener = listener.take_if(|_| rank == 0);
                change(&mut joining);
                let work = &work;
                scope.spawn(move || work(Control::join(joining)))
            })
            .collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn usual(_: &mut Joining) {}

/// The sentences that all ranks end with.
fn refusals(size: usize, change: impl Fn(&mut Joining) + Sync) -> Vec<String> {
    ranks(size, change, |joined| joined.err().expect("the ranks differ").to_string())
}

fn same(sentences: &[String]) -> &str {
    assert!(sentences.iter().all(|sentence| *sentence == sentences[0]), "not the same on all ranks: {sentences:#?}");
    assert!(!sentences[0].ends_with('.') && !sentences[0].contains('\n'), "{}", sentences[0]);
    &sentences[0]
}

#[test]
fn ranks_meet_and_pass_things() {
    let large: Vec<u8> = (0..5_000_000u32).map(|i| (i % 251) as u8).collect();
    ranks(4, usual, |joined| {
        let (control, notes) = joined.unwrap();
        assert!(notes.is_empty(), "{notes:?}");
        let rank = control.rank();
        assert_eq!((control.size(), control.machines()), (4, &vec![0..4; 1][..]));
        let names: Vec<String> = control.ranks().iter().map(Who::to_string).collect();
        assert_eq!(names[3], format!("rank 3 (here, process {}, CPU)", std::process::id()));
        let id: Vec<u8> = (0..128).collect();
        let given = if rank == 0 { &id[..] } else { b"ignored" };
        assert_eq!(control.broadcast("the identity", given).unwrap(), id);
        control.agree("the data", &[Fact::new("data", "digits"), Fact::new("betas", "0.1, ".repeat(999))]).unwrap();
        let all = control.gather("names", format!("I am {rank}").repeat(rank).as_bytes()).unwrap();
        let want = ["", "I am 1", "I am 2I am 2", "I am 3I am 3I am 3"].map(|text| text.as_bytes().to_vec());
        assert_eq!(all, (rank == 0).then(|| want.to_vec()));
        control.barrier("what follows").unwrap();
        let part = if rank == 2 { &large[..] } else { b"" };
        if let Some(all) = control.gather("a large one", part).unwrap() {
            assert!(all[2] == large && all[1].is_empty());
        }
        assert!(control.broadcast("a large one", if rank == 0 { &large } else { b"" }).unwrap() == large);
        control.check().unwrap();
        control.leave().unwrap();
    });
    // Alone nothing is asked of the network.
    let (control, _) = Control::join(Joining { token: None, ..joining(0, 1, 1) }).unwrap();
    assert_eq!(control.gather("x", b"mine").unwrap(), Some(vec![b"mine".to_vec()]));
    assert_eq!(control.broadcast("x", b"mine").unwrap(), b"mine");
    control.barrier("x").unwrap();
    assert_eq!(control.next(1).unwrap(), None);
    control.ask_to_stop(130, "Ctrl-C");
    assert_eq!(control.next(2).unwrap(), Some(Stop { after: 1, code: 130, why: "Ctrl-C".into(), rank: 0 }));
    control.leave().unwrap();
}

#[test]
fn machines_follow_from_local_ranks() {
    let two = |joining: &mut Joining| {
        let world = &mut joining.world;
        (world.local_rank, world.local_size) = (world.rank % 2, Some(2));
        joining.host = format!("n{}", world.rank / 2);
    };
    ranks(4, two, |joined| {
        let (control, _) = joined.unwrap();
        assert_eq!(control.machines(), [0..2, 2..4]);
        control.leave().unwrap();
    });
    let dealt = |joining: &mut Joining| {
        let world = &mut joining.world;
        (world.local_rank, world.local_size) = (world.rank / 2, None);
        joining.host = format!("n{}", world.rank % 2);
    };
    let said = refusals(4, dealt);
    assert!(same(&said).contains("must follow each other, as with srun --distribution=block"), "{}", said[0]);
    let wrong = |joining: &mut Joining| joining.world.local_size = Some(if joining.world.rank == 1 { 2 } else { 3 });
    let said = refusals(3, wrong);
    assert!(same(&said).contains("rank 1 (here, process "), "{}", said[0]);
    assert!(said[0].contains("expects 2 ranks on its machine (LOCAL_WORLD_SIZE), and 3 have come, ranks 0 to 2"));
}

#[test]
fn a_difference_is_refused_by_name_on_every_rank() {
    let facts = ["protocol of the gradients", "setting learning_rate", "data", "kernels", "device", "NCCL"];
    for differing in facts {
        let change = |joining: &mut Joining| {
            joining.facts = facts.map(|name| Fact::new(name, "as on all")).to_vec();
            if joining.world.rank == 2 {
                let fact = joining.facts.iter_mut().find(|fact| fact.name == differing).unwrap();
                fact.value = "of its own".into();
            }
        };
        let said = refusals(4, change);
        let process = std::process::id();
        let want = format!(
            "rank 0 (here, process {process}, CPU) and rank 2 (here, process {process}, CPU) differ in {differing}: as on \
             all and of its own; it must be the same on all ranks"
        );
        assert_eq!(same(&said), want);
    }
    let said = refusals(3, |joining| joining.world.size = if joining.world.rank == 1 { 8 } else { 3 });
    assert!(same(&said).contains("differ in the number of ranks (WORLD_SIZE): 3 and 8"), "{}", said[0]);
    // One that comes later hears it too.
    let said = refusals(3, |joining| match joining.world.rank {
        1 => joining.facts = Vec::new(),
        2 => thread::sleep(Duration::from_millis(1500)),
        _ => {}
    });
    assert!(same(&said).contains("differ in steps: 7 and none"), "{}", said[0]);
    let said = refusals(3, |joining| joining.world.rank = joining.world.rank.min(1));
    assert!(same(&said).contains("have the same number: each rank (RANK) must be started once"), "{}", said[0]);

    // What is known only later.
    let said = ranks(3, usual, |joined| {
        let (control, _) = joined.unwrap();
        let data = if control.rank() == 1 { "60000 images, hash 7" } else { "60000 images, hash 8" };
        let said = control.agree("the data", &[Fact::new("data", data)]).unwrap_err().to_string();
        control.fail(&said);
        said
    });
    assert!(same(&said).contains("differ in data: 60000 images, hash 8 and 60000 images, hash 7; it"), "{}", said[0]);
}

/// What somebody says on a connection, and what is answered until it is closed.
fn say(port: u16, pieces: &[&[u8]]) -> Vec<u8> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    for piece in pieces {
        // It may have been closed by now.
        if stream.write_all(piece).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

/// The last message in an answer.
fn answered(bytes: &[u8]) -> Option<(u32, Message)> {
    let mut decoder = Decoder::default();
    decoder.push(bytes);
    let opened = decoder.opening().unwrap()?;
    let mut last = None;
    while let Some((message, _)) = decoder.message().unwrap() {
        last = Some(message);
    }
    Some((opened.protocol, last?))
}

fn hello(rank: usize, size: usize, version: &str) -> Vec<u8> {
    let who = Who { rank, local_rank: 0, host: "there".into(), process: 7, device: "CPU".into() };
    let facts = vec![Fact::new("the program's version", version), Fact::new("steps", 7)];
    head(&Message::Hello(Hello { who, size, local_size: None, facts }), 0)
}

#[test]
fn another_protocol_and_another_version_are_refused_with_both_sides_named() {
    let said = |bytes: Vec<u8>| {
        let (listener, port) = meeting_point();
        let rank_0 = Joining { listener: Some(listener), ..joining(0, 2, port) };
        let rank_0 = thread::spawn(|| Control::join(rank_0).err().unwrap().to_string());
        let answer = answered(&say(port, &[&bytes])).expect("a refusal");
        let here = rank_0.join().unwrap();
        assert_eq!(answer, (PROTOCOL, Message::Refused { why: here.clone() }));
        here
    };
    let mut other = opening(SECRET);
    other[8] = 77;
    let text = said(other);
    assert!(text.starts_with("a rank at 127.0.0.1 speaks protocol 77, and rank 0 protocol 1: "), "{text}");
    let text = said([opening(SECRET), hello(1, 2, "0.0.7")].concat());
    let version = env!("CARGO_PKG_VERSION");
    assert!(text.contains(&format!("differ in the program's version: {version} and 0.0.7; it")), "{text}");
    assert!(text.contains("rank 1 (there, process 7, CPU)"), "{text}");
    let text = said([opening(SECRET), head(&Message::Leave, 0)].concat());
    assert!(text.contains("does not say who it is"), "{text}");
    let text = said([opening(SECRET), b"\xff\xff\xff\xff\xff\xff\xff\xff".to_vec()].concat());
    assert!(text.contains("a message of 4294967295 bytes"), "{text}");
    let text = said([opening(SECRET), hello(2, 2, version)].concat());
    assert!(text.contains("has come, and there are 2 ranks, counted from 0"), "{text}");

    // And the other way: rank 0 is of another version.
    let (listener, port) = meeting_point();
    let rank_1 = thread::spawn(move || Control::join(joining(1, 2, port)).err().unwrap().to_string());
    let (mut stream, _) = listener.accept().unwrap();
    let mut other = opening("");
    other[8] = 77;
    stream.write_all(&other).unwrap();
    let text = rank_1.join().unwrap();
    assert!(text.contains("speaks protocol 77, and rank 1 protocol 1: all must be the same version"), "{text}");
}

#[test]
fn strangers_neither_enter_nor_disturb() {
    let (listener, port) = meeting_point();
    let rank_0 = Joining { listener: Some(listener), ..joining(0, 2, port) };
    let rank_0 = thread::spawn(|| Control::join(rank_0));
    let noise: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for junk in [&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], b"\0", &[0; 1 << 20], &noise, b"ddpmrunk", b"\x16\x03\x01"]
    {
        assert!(say(port, &[junk]).is_empty(), "strangers get no answer");
    }
    // Half an opening and then the end, too long a secret, and nothing at all.
    let half = |bytes: &[u8]| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    };
    assert!(half(&opening(SECRET)[..15]).is_empty() && half(b"").is_empty());
    assert!(say(port, &[b"ddpmrank\x01\0\0\0\xff", &noise]).is_empty());
    // With another secret, and with none.
    for secret in ["a secreT", "a secre", "a secret and more", ""] {
        let answer = answered(&say(port, &[&opening(secret), &hello(1, 2, env!("CARGO_PKG_VERSION"))]));
        let Some((PROTOCOL, Message::Refused { why })) = answer else { panic!("{secret}: {answer:?}") };
        assert!(why.contains("DDPM_JOIN_TOKEN") && !why.contains(SECRET), "{why}");
    }
    // Many who say nothing and stay, more than are kept.
    let silent: Vec<TcpStream> =
        (0..300).filter_map(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()).collect();
    let (control, _) = Control::join(joining(1, 2, port)).unwrap();
    let (first, notes) = rank_0.join().unwrap().unwrap();
    assert!(notes.len() == 1 && notes[0].contains(" connections to 127.0.0.1:"), "{notes:?}");
    drop(silent);
    // From now on nobody can come.
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
    let barrier = thread::spawn(move || control.barrier("x").and_then(|()| control.leave()));
    first.barrier("x").and_then(|()| first.leave()).unwrap();
    barrier.join().unwrap().unwrap();
}

#[test]
fn a_rank_with_another_secret_says_so_and_the_right_one_still_comes() {
    let (listener, port) = meeting_point();
    let rank_0 = Joining { listener: Some(listener), ..joining(0, 2, port) };
    let rank_0 = thread::spawn(|| Control::join(rank_0));
    let wrong = Joining { token: Some("another".into()), ..joining(1, 2, port) };
    let said = Control::join(wrong).err().unwrap().to_string();
    assert!(said.contains("DDPM_JOIN_TOKEN must be the same on every rank"), "{said}");
    let rank_1 = thread::spawn(move || Control::join(joining(1, 2, port)).unwrap().0.leave());
    let (control, notes) = rank_0.join().unwrap().unwrap();
    assert!(notes[0].starts_with("1 connection to ") && notes[0].contains("it has another secret"), "{notes:?}");
    control.leave().unwrap();
    rank_1.join().unwrap().unwrap();
}

/// A rank whose bytes come one by one is a rank all the same.
#[test]
fn a_slow_rank_enters() {
    let (listener, port) = meeting_point();
    let mut rank_0 = Joining { listener: Some(listener), ..joining(0, 2, port) };
    rank_0.world.local_size = None;
    let rank_0 = thread::spawn(|| {
        let (control, _) = Control::join(rank_0).unwrap();
        let said = control.barrier("x").unwrap_err().to_string();
        control.fail(&said);
        said
    });
    let bytes = [opening(SECRET), hello(1, 2, env!("CARGO_PKG_VERSION"))].concat();
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    for byte in &bytes {
        stream.write_all(&[*byte]).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    let mut decoder = Decoder::default();
    let mut chunk = [0; 4096];
    let mut opened = false;
    'welcome: loop {
        let n = stream.read(&mut chunk).unwrap();
        assert!(n > 0, "rank 0 closes the connection");
        decoder.push(&chunk[..n]);
        opened |= !opened && decoder.opening().unwrap().is_some();
        while opened && let Some((message, _)) = decoder.message().unwrap() {
            if let Message::Welcome { ranks } = message {
                assert_eq!(ranks.len(), 2);
                break 'welcome;
            }
        }
    }
    // It then says what no rank says.
    stream.write_all(&head(&Message::Goodbye, 0)).unwrap();
    let said = rank_0.join().unwrap();
    assert!(said.starts_with("rank 1 (there, process 7, CPU) has sent what no rank sends, Goodbye"), "{said}");
}

#[test]
fn missing_ranks_are_listed_on_every_rank() {
    let (listener, port) = meeting_point();
    let mut listener = Some(listener);
    let timeouts = Timeouts { join: Duration::from_millis(1500), ..patient() };
    let threads: Vec<_> = [0, 2]
        .map(|rank| {
            let mut joining = Joining { timeouts, ..joining(rank, 5, port) };
            joining.listener = listener.take_if(|_| rank == 0);
            thread::spawn(|| Control::join(joining).err().unwrap().to_string())
        })
        .into_iter()
        .collect();
    let said: Vec<String> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let want = format!(
        "ranks 1, 3 and 4 of 5 have not come to 127.0.0.1:{port} within 1.5 s: they were not started, or cannot reach it"
    );
    assert_eq!(same(&said), want);
}

#[test]
fn who_finds_nobody_or_somebody_else_says_where() {
    let (listener, port) = meeting_point();
    drop(listener);
    let timeouts = Timeouts { join: Duration::from_millis(700), ..patient() };
    let said = Control::join(Joining { timeouts, ..joining(1, 2, port) }).err().unwrap().to_string();
    let start = format!("rank 1 (here) has not reached rank 0 at 127.0.0.1:{port} within 0.7 s: 127.0.0.1:{port}: ");
    assert!(said.starts_with(&start), "{said}");

    let (listener, port) = meeting_point();
    let other = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        let _ = stream.read(&mut [0; 4096]);
    });
    let said = Control::join(joining(1, 2, port)).err().unwrap().to_string();
    assert!(said.starts_with(&format!("what listens on 127.0.0.1:{port} is not rank 0 of this program")), "{said}");
    other.join().unwrap();

    // A port that is taken, an address of another machine, and one that is open to others.
    let (_taken, port) = meeting_point();
    let said = Control::join(joining(0, 2, port)).err().unwrap().to_string();
    assert!(said.contains("which another process uses") && said.contains("MASTER_PORT"), "{said}");
    let mut away = joining(0, 2, 29_500);
    // Of a block that is for documentation.
    away.world.address = "192.0.2.7".into();
    let said = Control::join(away).err().unwrap().to_string();
    assert!(said.contains("192.0.2.7:29500, which is no address of its machine: MASTER_ADDR"), "{said}");
    for rank in 0..2 {
        let mut open = Joining { token: None, ..joining(rank, 2, 29_500) };
        open.world.address = "192.0.2.7".into();
        let error = Control::join(open).err().unwrap();
        assert!(matches!(error, Error::Usage(_)) && error.to_string().contains("set DDPM_JOIN_TOKEN"), "{error}");
    }
}

#[test]
fn a_rank_that_ends_or_is_interrupted_before_all_have_come_ends_the_meeting() {
    let (listener, port) = meeting_point();
    let rank_0 = Joining { listener: Some(listener), ..joining(0, 3, port) };
    let rank_0 = thread::spawn(|| Control::join(rank_0).err().unwrap().to_string());
    let rank_1 = thread::spawn(move || Control::join(joining(1, 3, port)).err().unwrap().to_string());
    let leaves = joining(2, 4, port);
    let cancelled = leaves.cancelled.clone();
    cancelled.store(true, Ordering::Relaxed);
    assert!(matches!(Control::join(leaves), Err(Error::Interrupted)));
    thread::sleep(Duration::from_secs(1));
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.write_all(&[opening(SECRET), hello(2, 3, env!("CARGO_PKG_VERSION"))].concat()).unwrap();
    drop(stream);
    let said = [rank_0, rank_1].map(|thread| thread.join().unwrap());
    assert!(same(&said).contains("rank 2 (there, process 7, CPU) has ended before all ranks had come"), "{}", said[0]);

    let (listener, port) = meeting_point();
    let rank_0 = Joining { listener: Some(listener), ..joining(0, 3, port) };
    let cancelled = rank_0.cancelled.clone();
    let rank_0 = thread::spawn(|| Control::join(rank_0).err().unwrap());
    let rank_1 = thread::spawn(move || Control::join(joining(1, 3, port)).err().unwrap().to_string());
    thread::sleep(Duration::from_secs(1));
    cancelled.store(true, Ordering::Relaxed);
    assert!(matches!(rank_0.join().unwrap(), Error::Interrupted));
    let said = rank_1.join().unwrap();
    assert!(said.contains("rank 0 (here, process ") && said.contains("was interrupted before all"), "{said}");
}

/// Numbers that look random, the same in each run.
struct Draws(u64);

impl Draws {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Whoever asks, and however far ranks are ahead of each other, all do the same steps and exit with the same code.
#[test]
fn all_stop_after_the_same_step() {
    let mut after = Vec::new();
    for round in 0..12 {
        // Two ask at once in some rounds.
        let askers = [round % 4, (round / 4 + round) % 4];
        let ends = ranks(4, usual, |joined| {
            let (control, _) = joined.unwrap();
            let rank = control.rank();
            let mut draws = Draws((round * 4 + rank) as u64);
            // Nothing holds these ranks together, so they drift apart.
            let pace = 1 + draws.below(4);
            let asks_at = 20 + draws.below(10) as u32;
            let mut done = 0;
            let stop = loop {
                if askers.contains(&rank) && done == asks_at {
                    control.ask_to_stop(140 + rank as u8, "SIGTERM");
                }
                if let Some(stop) = control.next(done + 1).unwrap() {
                    break stop;
                }
                thread::sleep(Duration::from_millis(draws.below(2 * pace)));
                done += 1;
            };
            assert!(control.is_stopping());
            control.leave().unwrap();
            (done, stop)
        });
        let (done, stop) = &ends[0];
        assert!(ends.iter().all(|end| end == &ends[0]), "round {round}: {ends:?}");
        assert_eq!((stop.after, stop.why.as_str()), (*done, "SIGTERM"));
        assert!(askers.contains(&stop.rank) && stop.code == 140 + stop.rank as u8, "{stop:?}");
        after.push(*done);
    }
    assert!(after.iter().all(|done| *done >= 20), "{after:?}");
}

/// A rank that has done its last step, or has not begun its first one, answers too.
#[test]
fn ranks_at_either_end_of_their_work_agree_to_stop() {
    let ends = ranks(3, usual, |joined| {
        let (control, _) = joined.unwrap();
        match control.rank() {
            0 => {
                control.next(1).unwrap();
                control.next(2).unwrap();
                control.barrier("x").unwrap();
                control.ask_to_stop(130, "Ctrl-C");
                control.leave().unwrap();
                None
            }
            1 => {
                control.barrier("x").unwrap();
                let mut done = 0;
                while control.next(done + 1).unwrap().is_none() {
                    done += 1;
                    thread::sleep(Duration::from_millis(5));
                }
                control.leave().unwrap();
                Some(done)
            }
            _ => {
                control.barrier("x").unwrap();
                thread::sleep(Duration::from_millis(300));
                let mut done = 0;
                while control.next(done + 1).unwrap().is_none() {
                    done += 1;
                }
                control.leave().unwrap();
                Some(done)
            }
        }
    });
    assert!(ends[1] == ends[2] && ends[1] >= Some(2), "{ends:?}");
}

/// What all ranks of three end with if `rank` does `what` and the others wait for it.
fn after(rank: usize, what: impl Fn(Control) + Sync) -> Vec<Option<String>> {
    ranks(3, usual, |joined| {
        let (control, _) = joined.unwrap();
        control.next(5).unwrap();
        control.barrier("the beginning").unwrap();
        if control.rank() == rank {
            what(control);
            return None;
        }
        let began = Instant::now();
        let said = control.barrier("the end").unwrap_err().to_string();
        assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
        assert_eq!(control.check().unwrap_err().to_string(), said);
        assert_eq!(control.next(6).unwrap_err().to_string(), said);
        control.fail("for another reason, which nobody hears of");
        Some(said)
    })
}

#[test]
fn the_words_of_a_rank_that_fails_reach_all() {
    for rank in [0, 2] {
        let here = format!("rank {rank} (here, process {}, CPU)", std::process::id());
        let said = |what: &(dyn Fn(Control) + Sync)| {
            let said: Vec<String> = after(rank, what).into_iter().flatten().collect();
            assert_eq!(said.len(), 2);
            same(&said).to_string()
        };
        assert_eq!(said(&|control| control.fail("out of memory")), format!("{here} failed at step 5: out of memory"));
        assert_eq!(said(&drop), format!("{here} failed at step 5: ended early"));
        let panics = |control: Control| {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                let _held = control;
                std::panic::resume_unwind(Box::new("planted"));
            }));
            assert!(caught.is_err());
        };
        assert_eq!(said(&panics), format!("{here} failed at step 5: panicked, a fault of the program"));
        let long = said(&|control| control.fail(&"\u{1b}[2J".repeat(100_000)));
        assert!(long.len() < 2000 && !long.contains('\u{1b}'), "{} bytes", long.len());
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_and_announced_work_is_waited_for() {
    let short = |joining: &mut Joining| joining.timeouts.wait = Duration::from_millis(600);
    let said = ranks(3, short, |joined| {
        let (control, _) = joined.unwrap();
        control.next(9).unwrap();
        control.barrier("the beginning").unwrap();
        if control.rank() == 1 {
            // Alive, and busy with something else.
            until_failed(&control);
        } else {
            let error = control.barrier("the step").unwrap_err();
            control.fail(&error.to_string());
            return error.to_string();
        }
        let said = control.check().unwrap_err().to_string();
        control.fail("x");
        said
    });
    let late =
        format!("rank 1 (here, process {}, CPU) has not come to the barrier of the step within", std::process::id());
    assert!(said[0].starts_with(&format!("{late} 0.6 s")), "{said:?}");
    assert!(said.iter().all(|said| said.contains(&late)), "{said:?}");

    // Announced, it may take longer, and what all wait for does not matter.
    ranks(3, short, |joined| {
        let (control, _) = joined.unwrap();
        control.barrier("the beginning").unwrap();
        if control.rank() == 1 {
            let work = control.announce("saving", Duration::from_secs(60));
            thread::sleep(Duration::from_millis(2000));
            drop(work);
            thread::sleep(Duration::from_millis(300));
        }
        control.barrier("the step").unwrap();
        control.leave().unwrap();
    });

    // But not longer than it has announced.
    let said = ranks(2, short, |joined| {
        let (control, _) = joined.unwrap();
        control.barrier("the beginning").unwrap();
        if control.rank() == 1 {
            let _work = control.announce("saving a checkpoint", Duration::from_millis(300));
            until_failed(&control);
        }
        let error = control.barrier("the step").unwrap_err();
        control.fail(&error.to_string());
        error.to_string()
    });
    assert!(
        said[0].contains("rank 1 (here") && said[0].contains("longer than it has announced for saving a"),
        "{said:?}"
    );

    // A wait for anything else has the same deadline.
    let (control, _) = Control::join({
        let mut alone = joining(0, 1, 1);
        alone.timeouts.wait = Duration::from_millis(300);
        alone
    })
    .unwrap();
    let (mut wait, began) = (control.wait("the exchange of gradients"), Instant::now());
    let error = loop {
        if let Err(e) = wait.poll() {
            break e.to_string();
        }
        assert!(began.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(error, "the exchange of gradients has not ended within 0.3 s; the last known steps of the ranks are 0");
    assert!(began.elapsed() >= Duration::from_millis(300));
    drop(wait);
    control.leave().unwrap();
}

#[test]
fn ranks_that_do_not_do_the_same_are_both_named() {
    let said = ranks(2, usual, |joined| {
        let (control, _) = joined.unwrap();
        control.barrier("the beginning").unwrap();
        let error = match control.rank() {
            0 => control.barrier("the step").unwrap_err(),
            _ => control.gather("the moments", b"x").and_then(|_| control.barrier("the step")).unwrap_err(),
        };
        control.fail(&error.to_string());
        error.to_string()
    });
    assert!(said[0].contains("is at its task 1, the barrier of the step, and rank 1 ("), "{said:?}");
    assert!(said[0].contains("at its task 1, the gather of the moments: the ranks do not do the same"), "{said:?}");
    assert!(said[1].contains(&said[0]), "{said:?}");
}

#[test]
fn a_cancelled_rank_waits_no_longer_and_tells_the_others() {
    let (sender, receiver) = mpsc::channel();
    let receiver = std::sync::Mutex::new(receiver);
    let change = |joining: &mut Joining| {
        if joining.world.rank == 1 {
            sender.send(joining.cancelled.clone()).unwrap();
        }
    };
    let ends = ranks(3, change, |joined| {
        let (control, _) = joined.unwrap();
        control.barrier("the beginning").unwrap();
        if control.rank() == 2 {
            let cancelled = receiver.lock().unwrap().recv().unwrap();
            thread::sleep(Duration::from_millis(100));
            cancelled.store(true, Ordering::Relaxed);
            until_failed(&control);
        }
        let error = control.barrier("the end").unwrap_err();
        control.fail(&error.to_string());
        error
    });
    assert!(matches!(ends[1], Error::Interrupted), "{ends:?}");
    for error in [&ends[0], &ends[2]] {
        let said = error.to_string();
        assert!(
            said.starts_with("rank 1 (here") && said.ends_with(" failed before its first step: interrupted"),
            "{said}"
        );
    }
}

/// As a rank does that notices in its own work.
fn until_failed(control: &Control) {
    let began = Instant::now();
    while control.check().is_ok() {
        assert!(began.elapsed() < Duration::from_secs(60), "nobody has failed");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A process that hangs after another rank has failed is ended by its background thread, unless it does what it has
/// announced.
#[test]
fn the_last_resort_is_for_a_rank_that_hangs() {
    let (sender, receiver) = mpsc::channel::<(usize, String, Instant)>();
    let change = |joining: &mut Joining| {
        let (sender, rank) = (sender.clone(), joining.world.rank);
        joining.timeouts.grace = Duration::from_millis(400);
        joining.last_resort = Some(Box::new(move |why: &str| sender.send((rank, why.into(), Instant::now())).unwrap()));
    };
    let began = Instant::now();
    ranks(4, change, |joined| {
        let (control, _) = joined.unwrap();
        control.barrier("the beginning").unwrap();
        match control.rank() {
            0 => control.fail("out of memory"),
            // As in a call of the driver.
            1 => thread::sleep(Duration::from_millis(3000)),
            2 => {
                let work = control.announce("saving", Duration::from_secs(60));
                thread::sleep(Duration::from_millis(1500));
                drop(work);
                control.fail("late");
            }
            _ => {
                until_failed(&control);
                control.fail("x");
            }
        }
    });
    drop(sender);
    let calls: Vec<_> = receiver.try_iter().collect();
    let [(rank, why, when)] = &calls[..] else { panic!("{calls:?}") };
    assert_eq!(*rank, 1);
    assert!(why.contains("rank 0 (here") || why.contains("rank 3 (here"), "{why}");
    let after = when.duration_since(began);
    assert!((Duration::from_millis(400)..Duration::from_millis(2500)).contains(&after), "after {after:?}");
}
