//! What is refused, and in which words. Between ranks: calls that should be one and differ, and waits without end. On
//! one rank: memory, streams, threads, groups, states.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each passes a call the arguments that it declares, some of them wrong on purpose, which is refused"
)]

mod support;

use std::ffi::c_int;
use std::sync::Barrier;

use cudarc::driver::result;
use support::*;

/// Two ranks, of which at least one is refused; the other gets the same sentence by its communicator or while it waits.
fn between(words: &str, left: impl Fn(&Rank) -> c_int + Sync, right: impl Fn(&Rank) -> c_int + Sync) {
    together(2, |rank| {
        let code = if rank.rank == 0 { left(rank) } else { right(rank) };
        // A rank that only sends does not wait on the emulator.
        let code = if code == SUCCESS { failed(rank) } else { code };
        assert_eq!(code, USAGE, "{words}: {}", last_error_of(rank.comm));
        assert_eq!(rank.status(), USAGE);
        let said = last_error_of(rank.comm);
        assert_eq!(said, words);
        // It can only be aborted.
        refused(rank.all_gather(0, 0, 0), USAGE, "has failed and can only be aborted: ");
        refused(unsafe { (nccl().destroy)(rank.comm) }, USAGE, "has failed and can only be aborted: ");
        refused(unsafe { (nccl().finalize)(rank.comm) }, USAGE, "has failed and can only be aborted: ");
    });
}

/// The status of a communicator that is about to fail.
fn failed(rank: &Rank) -> c_int {
    let start = std::time::Instant::now();
    while rank.status() == SUCCESS {
        assert!(start.elapsed() < LONGEST, "rank {} does not fail", rank.rank);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    rank.status()
}

fn all_gathers(count: usize) -> impl Fn(&Rank) -> c_int + Sync {
    move |rank| {
        let (from, to) = (rank.upload(&vec![1.0f32; count]), rank.upload(&vec![0.0f32; 2 * count]));
        let code = rank.all_gather(rank.at(&from), rank.at(&to), count);
        assert!(rank.read(&to).iter().all(|x| x.is_nan()), "what never arrives is NaN");
        code
    }
}

fn all_reduces(dtype: c_int, op: c_int) -> impl Fn(&Rank) -> c_int + Sync {
    move |rank| {
        let buffer = rank.upload(&[1.0f64; 4]);
        rank.all_reduce(rank.at(&buffer), rank.at(&buffer), 4, dtype, op)
    }
}

fn broadcasts(root: usize) -> impl Fn(&Rank) -> c_int + Sync {
    move |rank| {
        let buffer = rank.upload(&[1.0f32; 4]);
        rank.broadcast(rank.at(&buffer), rank.at(&buffer), 4, root)
    }
}

fn sends(count: usize) -> impl Fn(&Rank) -> c_int + Sync {
    move |rank| {
        let buffer = rank.upload(&vec![1.0f32; count]);
        rank.send(rank.at(&buffer), count, 1 - rank.rank)
    }
}

fn receives(count: usize) -> impl Fn(&Rank) -> c_int + Sync {
    move |rank| {
        let buffer = rank.upload(&vec![1.0f32; count]);
        rank.recv(rank.at(&buffer), count, 1 - rank.rank)
    }
}

#[test]
fn another_count() {
    between("call 1: rank 0 all-gathers 4096 f32, rank 1 4095 f32", all_gathers(4096), all_gathers(4095));
}

#[test]
fn another_type() {
    between(
        "call 1: rank 0 all-reduces 4 f32 (sum), rank 1 4 bf16 (sum)",
        all_reduces(F32, SUM),
        all_reduces(BF16, SUM),
    );
}

#[test]
fn another_operator() {
    let words = "call 1: rank 0 all-reduces 4 i32 (sum), rank 1 4 i32 (maximum)";
    between(words, all_reduces(I32, SUM), all_reduces(I32, MAX));
}

#[test]
fn another_root() {
    between("call 1: rank 0 broadcasts 4 f32 from rank 0, rank 1 4 f32 from rank 1", broadcasts(0), broadcasts(1));
}

#[test]
fn another_kind() {
    let words = "call 1: rank 0 broadcasts 4 f32 from rank 0, rank 1 all-reduces 4 f32 (sum)";
    between(words, broadcasts(0), all_reduces(F32, SUM));
}

/// One rank has made a call that the other leaves out.
#[test]
fn another_sequence() {
    between("call 1: rank 0 all-gathers 8 f32, rank 1 broadcasts 4 f32 from rank 0", all_gathers(8), broadcasts(0));
    let twice = |rank: &Rank| {
        let buffer = rank.upload(&[1.0f32; 4]);
        let code = rank.broadcast(rank.at(&buffer), rank.at(&buffer), 4, 0);
        if rank.rank == 0 {
            return rank.reduce(rank.at(&buffer), rank.at(&buffer), 4, 0);
        }
        assert_eq!(code, SUCCESS);
        // Nothing, and then the call after next.
        rank.all_reduce(rank.at(&buffer), rank.at(&buffer), 4, F32, SUM)
    };
    between("call 2: rank 0 reduces 4 f32 (sum) to rank 0, rank 1 all-reduces 4 f32 (sum)", twice, twice);
}

#[test]
fn another_group() {
    let grouped = |rank: &Rank| {
        let buffer = rank.upload(&[1.0f32; 4]);
        group_start();
        for part in 0..2 {
            let at = rank.at(&buffer) + 8 * part;
            assert_eq!(rank.broadcast(at, at, 2, 0), SUCCESS);
        }
        group_end()
    };
    let alone = |rank: &Rank| {
        let buffer = rank.upload(&[1.0f32; 4]);
        rank.broadcast(rank.at(&buffer), rank.at(&buffer), 2, 0)
    };
    let words = "call 1: rank 0 broadcasts 2 f32 from rank 0 as number 1 of 2 collective calls of a group, rank 1 2 f32 from \
                 rank 0 alone";
    between(words, grouped, alone);
}

#[test]
fn only_one_is_captured() {
    let captured = |rank: &Rank| {
        let buffer = rank.upload(&[1.0f32; 4]);
        let graph = rank.capture(|| {
            let code = rank.broadcast(rank.at(&buffer), rank.at(&buffer), 4, 0);
            assert_eq!(code, SUCCESS, "{}", last_error());
        });
        graph.launch().unwrap();
        assert!(rank.read(&buffer).iter().all(|x| x.is_nan()));
        rank.status()
    };
    let words = "call 1: rank 0 broadcasts 4 f32 from rank 0 in a graph, rank 1 4 f32 from rank 0 outside any graph";
    between(words, captured, broadcasts(0));
}

#[test]
fn a_send_and_a_receive_that_differ() {
    between("call 1: rank 0 sends 10 f32 to rank 1, rank 1 receives 12 f32 from rank 0", sends(10), receives(12));
}

#[test]
fn waits_without_end() {
    let words = "all ranks wait: rank 0 receives 3 f32 from rank 1 in its call 1, rank 1 receives 3 f32 from rank 0 in its \
                 call 1; sends and receives that wait for each other belong in one group";
    between(words, receives(3), receives(3));
    let words = "call 1: rank 0 all-gathers 2 f32, rank 1 receives 3 f32 from rank 0, and all ranks wait";
    between(words, all_gathers(2), receives(3));
}

#[test]
fn two_sends_without_a_group() {
    between(
        "all ranks wait: rank 0 sends 3 f32 to rank 1 in its call 1, rank 1 sends 3 f32 to rank 0 in its call 1; sends and \
         receives that wait for each other belong in one group",
        sends(3),
        sends(3),
    );
}

#[test]
fn a_rank_that_has_ended_is_needed() {
    together(2, |rank| {
        if rank.rank == 1 {
            return;
        }
        let buffer = rank.upload(&[1.0f32; 3]);
        let code = rank.send(rank.at(&buffer), 3, 1);
        let code = if code == SUCCESS { failed(rank) } else { code };
        assert_eq!(code, USAGE);
        let said = last_error_of(rank.comm);
        assert_eq!(said, "rank 0 sends 3 f32 to rank 1 in its call 1, but rank 1 has ended its part");
    });
}

/// One rank aborts; the other learns of it.
#[test]
fn a_rank_that_has_aborted_is_missed() {
    together(2, |rank| {
        if rank.rank == 1 {
            return rank.abort();
        }
        let (from, to) = (rank.upload(&[1.0f32; 3]), rank.upload(&[1.0f32; 6]));
        let code = rank.all_gather(rank.at(&from), rank.at(&to), 3);
        assert_eq!(code, REMOTE, "{}", last_error());
        assert!(last_error().contains("rank 1 (process ") && last_error().ends_with(") has aborted its communicator"));
        assert_eq!(rank.status(), REMOTE);
    });
}

#[test]
fn memory_of_one_allocation_on_the_right_device() {
    together(2, |rank| {
        let buffer = rank.upload(&[1.0f32; 16]);
        let at = rank.at(&buffer);
        let whole = buffer.num_bytes() as u64;
        assert_eq!(whole, 64);
        refused(rank.all_gather(at, at + 48, 4), ARGUMENT, "ncclAllGather, where it receives: 32 bytes at ");
        refused(rank.send(at + 32, 9, 0), ARGUMENT, "36 bytes at ");
        refused(rank.send(at + 32, 9, 0), ARGUMENT, " end 4 bytes behind their allocation of 64 bytes at ");
        refused(rank.send(0, 1, 0), ARGUMENT, "ncclSend, what it sends: the pointer to 4 bytes is null");
        refused(rank.recv(0, 2, 0), ARGUMENT, "ncclRecv, where it receives: the pointer to 8 bytes is null");
        refused(rank.send(at + 2, 1, 0), ARGUMENT, " is no multiple of an element's 4 bytes");
        let on_the_stack = [1.0f32; 4];
        refused(rank.send(on_the_stack.as_ptr() as u64, 4, 0), ARGUMENT, " is no memory of the driver");
        let pinned = unsafe { result::malloc_host(64, 0) }.unwrap();
        refused(rank.send(pinned as u64, 4, 0), ARGUMENT, " is memory of the host, which this library does not take");
        unsafe { result::free_host(pinned) }.unwrap();
        let (other, stream) = device(3);
        let foreign = stream.clone_htod(&[1.0f32; 4]).unwrap();
        refused(
            rank.send(rank.at(&foreign), 4, 0),
            ARGUMENT,
            &format!(" is on device 3, but rank {} is on device ", rank.rank),
        );
        drop((foreign, stream, other));
        rank.context.bind_to_thread().unwrap();
        assert_eq!(rank.status(), SUCCESS);
    });
}

#[test]
fn buffers_that_overlap() {
    together(2, |rank| {
        let buffer = rank.upload(&[1.0f32; 16]);
        let at = rank.at(&buffer);
        refused(rank.all_reduce(at, at + 4, 4, F32, SUM), ARGUMENT, "which overlap, but not as an operation in place");
        refused(rank.broadcast(at + 4, at, 4, rank.rank), ARGUMENT, "which overlap, but not as an operation in place");
        // In place is at the rank's own part.
        let of_other = at + 16 * (1 - rank.rank as u64);
        refused(rank.all_gather(of_other, at, 4), ARGUMENT, "which overlap, but not as an operation in place");
        refused(rank.reduce_scatter(at, of_other, 4), ARGUMENT, "which overlap, but not as an operation in place");
        let group = |second: &dyn Fn() -> c_int, words: &str| {
            group_start();
            assert_eq!(rank.recv(at, 4, 1 - rank.rank), SUCCESS);
            assert_eq!(second(), SUCCESS);
            refused(group_end(), USAGE, words);
        };
        group(&|| rank.recv(at + 12, 4, 1 - rank.rank), ", which its call 2 writes too");
        group(&|| rank.send(at + 12, 4, 1 - rank.rank), ", which its call 2 reads");
        assert_eq!(rank.status(), SUCCESS);
    });
}

#[test]
fn numbers_that_mean_nothing() {
    together(2, |rank| {
        let buffer = rank.upload(&[1.0f32; 16]);
        let at = rank.at(&buffer);
        refused(rank.all_reduce(at, at, 4, 10, SUM), ARGUMENT, "type 10 is none that this library has");
        refused(rank.all_reduce(at, at, 4, -1, SUM), ARGUMENT, "type -1 is none that this library has");
        refused(rank.all_reduce(at, at, 4, F32, 5), ARGUMENT, "operator 5 is none that this library has");
        refused(rank.broadcast(at, at, 4, 2), ARGUMENT, "there is no rank 2: it must be from 0 to 1");
        refused(rank.send(at, 4, usize::MAX), ARGUMENT, "there is no rank -1: it must be from 0 to 1");
        refused(rank.send(at, usize::MAX, 0), ARGUMENT, "elements are more than any memory has");
        refused(rank.send(at, 4, rank.rank), USAGE, "sends 1 times to itself in one group, and receives 0 times");
        assert_eq!(rank.status(), SUCCESS);
    });
}

#[test]
fn streams_of_others() {
    together(2, |rank| {
        let buffer = rank.upload(&[1.0f32; 16]);
        let at = rank.at(&buffer);
        let (other, stream) = device(rank.rank);
        let code = unsafe { (nccl().send)(at, 4, F32, 0, rank.comm, stream.cu_stream()) };
        refused(code, ARGUMENT, "is of another context than the communicator of rank ");
        rank.context.bind_to_thread().unwrap();
        let per_thread = std::ptr::without_provenance_mut(2);
        let code = unsafe { (nccl().send)(at, 4, F32, 0, rank.comm, per_thread) };
        refused(code, ARGUMENT, "the default stream per thread is not emulated");
        let second = rank.context.new_stream().unwrap();
        group_start();
        assert_eq!(rank.send(at, 4, 1 - rank.rank), SUCCESS);
        let code = unsafe { (nccl().recv)(at + 32, 4, F32, 1 - rank.rank as c_int, rank.comm, second.cu_stream()) };
        assert_eq!(code, SUCCESS);
        refused(group_end(), USAGE, "the calls of a group are on two streams of rank ");
        drop((stream, other));
        rank.context.bind_to_thread().unwrap();
    });
}

#[test]
fn groups_without_an_end_or_a_beginning() {
    together(1, |rank| {
        refused(group_end(), USAGE, "ncclGroupEnd without ncclGroupStart on this thread");
        let buffer = rank.upload(&[1.0f32; 16]);
        let at = rank.at(&buffer);
        // A call that is refused takes the group with it.
        group_start();
        assert_eq!(rank.broadcast(at, at, 4, 0), SUCCESS);
        refused(rank.broadcast(at, at, 4, 1), ARGUMENT, "there is no rank 1");
        refused(
            group_end(),
            ARGUMENT,
            "the group does not run, since one of its calls was refused: ncclBroadcast: there is",
        );
        assert_eq!(rank.broadcast(at, at, 4, 0), SUCCESS, "{}", last_error());
        // What must not happen in the middle.
        group_start();
        assert_eq!(rank.broadcast(at, at, 4, 0), SUCCESS);
        let open = "while a group with calls of it is open: end the group first";
        refused(unsafe { (nccl().finalize)(rank.comm) }, USAGE, open);
        refused(unsafe { (nccl().destroy)(rank.comm) }, USAGE, open);
        refused(unsafe { (nccl().abort)(rank.comm) }, USAGE, open);
        std::thread::scope(|scope| {
            let other = Sendable(rank);
            scope.spawn(move || {
                let other = &other;
                refused(other.0.all_gather(0, 0, 0), USAGE, "has a group open with calls of the same communicator");
            });
        });
        assert_eq!(group_end(), SUCCESS, "{}", last_error());
    });
}

/// A rank that another thread may use, as NCCL allows if only one does at a time.
struct Sendable<'a>(&'a Rank);

// SAFETY: the handle is a number, and the tests use it from one thread at a time, or to be refused.
unsafe impl Send for Sendable<'_> {}

#[test]
fn two_threads_at_once() {
    let inside = Barrier::new(2);
    together(2, |rank| {
        let (from, to) = (rank.upload(&[1.0f32; 3]), rank.upload(&[1.0f32; 6]));
        if rank.rank == 1 {
            // Rank 0's first thread waits for this one until its second has been refused.
            inside.wait();
        } else {
            let (other, inside) = (Sendable(rank), &inside);
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    let other = &other;
                    // Until the first thread is inside, there is nothing wrong with a question.
                    let start = std::time::Instant::now();
                    loop {
                        let mut none = 0;
                        let code = unsafe { (nccl().send)(0, 0, F32, 5, other.0.comm, other.0.stream.cu_stream()) };
                        assert!(code != SUCCESS && start.elapsed() < LONGEST, "{code}");
                        if code == USAGE {
                            break;
                        }
                        assert_eq!(unsafe { (nccl().count)(other.0.comm, &mut none) }, SUCCESS);
                    }
                    let said = last_error();
                    assert!(
                        said.starts_with("two threads are in the communicator of rank 0 at once, ThreadId("),
                        "{said}"
                    );
                    assert!(
                        said.contains(" in ncclAllGather and ThreadId(") && said.ends_with(" in ncclSend"),
                        "{said}"
                    );
                    refused(unsafe { (nccl().abort)(other.0.comm) }, USAGE, "two threads are in the communicator");
                    inside.wait();
                });
                // The question of the other thread may have been just under way.
                while rank.all_gather(rank.at(&from), rank.at(&to), 3) == USAGE {}
            });
            assert_eq!(rank.read(&to), [1.0; 6]);
            return;
        }
        assert_eq!(rank.all_gather(rank.at(&from), rank.at(&to), 3), SUCCESS, "{}", last_error());
    });
}

#[test]
fn use_after_the_end() {
    together(1, |rank| {
        let nccl = nccl();
        let buffer = rank.upload(&[1.0f32; 4]);
        let at = rank.at(&buffer);
        assert_eq!(unsafe { (nccl.finalize)(rank.comm) }, SUCCESS, "{}", last_error());
        refused(rank.broadcast(at, at, 4, 0), ARGUMENT, "the communicator of rank 0 has ended");
        refused(unsafe { (nccl.finalize)(rank.comm) }, ARGUMENT, "the communicator of rank 0 has ended");
        rank.close();
        let over = "the communicator is used after it was destroyed or aborted";
        refused(rank.broadcast(at, at, 4, 0), ARGUMENT, over);
        refused(unsafe { (nccl.destroy)(rank.comm) }, ARGUMENT, over);
        refused(unsafe { (nccl.abort)(rank.comm) }, ARGUMENT, over);
        let mut status = 0;
        refused(unsafe { (nccl.async_error)(rank.comm, &mut status) }, ARGUMENT, over);
        refused(unsafe { (nccl.async_error)(std::ptr::null_mut(), &mut status) }, ARGUMENT, "the communicator is null");
        let never = std::ptr::without_provenance_mut(4096);
        refused(unsafe { (nccl.destroy)(never) }, ARGUMENT, "was never a communicator of this library");
    });
}

#[test]
fn calls_while_one_is_in_progress() {
    let id = unique_id();
    let refused_one = Barrier::new(2);
    threads(2, |number| {
        let (rank, _) = Rank::open_as(number, 2, id, 0);
        assert_eq!(rank.settled(), SUCCESS, "{}", last_error_of(rank.comm));
        let buffer = rank.upload(&[1.0f32; 4]);
        let at = rank.at(&buffer);
        if number == 1 {
            refused_one.wait();
        }
        assert_eq!(rank.broadcast(at, at, 4, 0), IN_PROGRESS, "{}", last_error());
        if number == 0 {
            // Rank 1 has yet to come. The root waits, too: it receives its own data.
            let words = "while an earlier call is in progress: wait until ncclCommGetAsyncError no longer says so";
            refused(rank.broadcast(at, at, 4, 0), ARGUMENT, words);
            refused(unsafe { (nccl().finalize)(rank.comm) }, ARGUMENT, words);
            refused(unsafe { (nccl().destroy)(rank.comm) }, ARGUMENT, words);
            assert_eq!(rank.status(), IN_PROGRESS);
            refused_one.wait();
        }
        assert_eq!(rank.settled(), SUCCESS, "{}", last_error_of(rank.comm));
        rank.close();
    });
}

/// An abort ends a wait for a rank that never comes: of a call, of a graph, and of the making of a communicator.
#[test]
fn an_abort_ends_every_wait() {
    let id = unique_id();
    threads(2, |number| {
        let (rank, _) = Rank::open_as(number, 2, id, 0);
        assert_eq!(rank.settled(), SUCCESS, "{}", last_error_of(rank.comm));
        let buffer = rank.upload(&[1.0f32; 4]);
        let at = rank.at(&buffer);
        if number == 0 {
            assert_eq!(rank.broadcast(at, at, 4, 0), IN_PROGRESS, "{}", last_error());
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(rank.status(), IN_PROGRESS);
            rank.abort();
            assert!(rank.read(&buffer).iter().all(|x| x.is_nan()), "what never arrives is NaN");
        } else {
            assert_eq!(failed(&rank), REMOTE);
            rank.abort();
        }
    });
    let id = unique_id();
    let started = std::time::Instant::now();
    let (alone, code) = Rank::open_as(0, 2, id, 0);
    assert_eq!(code, IN_PROGRESS);
    alone.abort();
    assert!(started.elapsed() < LONGEST);
}

/// A graph waits in the thread that launches it; another thread aborts.
#[test]
fn an_abort_ends_the_wait_of_a_graph() {
    together(2, |rank| {
        let buffer = rank.upload(&[1.0f32; 4]);
        if rank.rank == 1 {
            let start = std::time::Instant::now();
            while rank.status() == SUCCESS {
                assert!(start.elapsed() < LONGEST);
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            assert_eq!(rank.status(), REMOTE);
            return;
        }
        let graph = rank.capture(|| {
            assert_eq!(rank.broadcast(rank.at(&buffer), rank.at(&buffer), 4, 0), SUCCESS, "{}", last_error());
        });
        let captured = "while graphs have 1 of its captured calls: NCCL would wait for their end";
        refused(unsafe { (nccl().finalize)(rank.comm) }, USAGE, captured);
        refused(unsafe { (nccl().destroy)(rank.comm) }, USAGE, captured);
        std::thread::scope(|scope| {
            let other = Sendable(rank);
            scope.spawn(move || {
                let other = &other;
                std::thread::sleep(std::time::Duration::from_millis(50));
                other.0.abort();
            });
            graph.launch().unwrap();
            rank.stream.synchronize().unwrap();
        });
        assert!(rank.read(&buffer).iter().all(|x| x.is_nan()), "what never arrives is NaN");
        // And once more, with nobody left to abort.
        graph.launch().unwrap();
        assert!(rank.read(&buffer).iter().all(|x| x.is_nan()));
    });
}

/// Opens a communicator as a rank; returns code and sentence.
fn joins(rank: usize, on: usize, size: c_int, id: Id, config: &Config) -> (c_int, String) {
    let (_context, _stream) = device(on);
    let mut comm = std::ptr::null_mut();
    let code = unsafe { (nccl().init_rank_config)(&mut comm, size, id, rank as c_int, config) };
    assert!(code != SUCCESS && comm.is_null(), "{code}, {comm:p}");
    (code, last_error())
}

#[test]
fn ranks_that_do_not_fit() {
    let both = |ranks: [(usize, usize, c_int); 2], expected: &str| {
        let id = unique_id();
        threads(2, |number| {
            let (rank, on, size) = ranks[number];
            let (code, said) = joins(rank, on, size, id, &Config::new(1));
            assert!(code == USAGE && said.contains(expected), "{code}: `{expected}` is not in: {said}");
        });
    };
    both([(0, 0, 2), (1, 1, 3)], " makes a communicator of ");
    both([(1, 0, 2), (1, 1, 2)], "rank 1 is there twice: process ");
    both([(0, 2, 2), (1, 2, 2)], " both use GPU 2 of ");
}

#[test]
fn arguments_of_a_new_communicator() {
    let id = unique_id();
    let with = |rank: c_int, size: c_int, id: Id, config: Option<Config>| {
        let (_context, _stream) = device(0);
        let mut comm = std::ptr::null_mut();
        let config = config.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let code = unsafe { (nccl().init_rank_config)(&mut comm, size, id, rank, config) };
        assert!(comm.is_null());
        (code, last_error())
    };
    let words = |(code, said): (c_int, String), expected: &str| {
        assert!(code == ARGUMENT && said.contains(expected), "{code}: `{expected}` is not in: {said}");
    };
    words(with(2, 2, id, None), "rank 2 of 2: ranks are numbered from 0 to 1");
    words(with(0, 0, id, None), "rank 0 of 0");
    words(with(-1, 2, id, None), "rank -1 of 2: neither may be negative");
    let plain = Config::new(1);
    words(with(0, 1, id, Some(Config { blocking: 2, ..plain })), "`blocking` is 2: it must be 0 or 1");
    words(with(0, 1, id, Some(Config { magic: 1, ..plain })), "it was not made by NCCL_CONFIG_INITIALIZER");
    words(with(0, 1, id, Some(Config { size: 16, ..plain })), "says that it has 16 bytes: it has 20 at least");
    words(with(0, 1, Id([7; 128]), None), "the id was not made by this library's ncclGetUniqueId");
    // The address of an id: 127.0.0.1 as an IPv6 address begins at byte 24.
    let mut far = id;
    far.0[36..40].copy_from_slice(&[10, 9, 0, 1]);
    let expected = "ranks meet at 10.9.0.1, which is no loopback address: set NCCL_EMU_ADDRESS=10.9.0.1 for every rank";
    words(with(0, 1, far, None), expected);
    // An older program's configuration has no `blocking`; the same id then makes a communicator, once.
    let (context, _stream) = device(0);
    let old = Config { version: 21300, blocking: 0, ..plain };
    let mut comm = std::ptr::null_mut();
    assert_eq!(unsafe { (nccl().init_rank_config)(&mut comm, 1, id, 0, &old) }, SUCCESS, "{}", last_error());
    let (code, said) = joins(0, 0, 1, id, &plain);
    assert!(
        code == USAGE && said.ends_with("joins a communicator that is complete: an id is for one communicator"),
        "{said}"
    );
    context.bind_to_thread().unwrap();
    assert_eq!(unsafe { (nccl().destroy)(comm) }, SUCCESS, "{}", last_error());
}

#[test]
fn groups_that_mix() {
    let (context, stream) = device(0);
    let [mut blocks, mut does_not] = [std::ptr::null_mut(); 2];
    let nccl = nccl();
    assert_eq!(unsafe { (nccl.init_rank)(&mut blocks, 1, unique_id(), 0) }, SUCCESS, "{}", last_error());
    let config = Config::new(0);
    let code = unsafe { (nccl.init_rank_config)(&mut does_not, 1, unique_id(), 0, &config) };
    let rank =
        |comm| Rank { rank: 0, size: 1, context: context.clone(), stream: stream.clone(), comm, ended: false.into() };
    let (blocks, does_not) = (rank(blocks), rank(does_not));
    assert_eq!((code, does_not.settled()), (IN_PROGRESS, SUCCESS), "{}", last_error());
    let buffer = blocks.upload(&[1.0f32; 8]);
    let at = blocks.at(&buffer);
    group_start();
    assert_eq!(blocks.broadcast(at, at, 4, 0), SUCCESS);
    assert_eq!(does_not.broadcast(at + 16, at + 16, 4, 0), SUCCESS);
    refused(group_end(), ARGUMENT, "a group has blocking communicators and others that are not");
    group_start();
    assert_eq!(blocks.broadcast(at, at, 4, 0), SUCCESS);
    let mut third = std::ptr::null_mut();
    assert_eq!(unsafe { (nccl.init_rank)(&mut third, 1, unique_id(), 0) }, SUCCESS, "{}", last_error());
    refused(group_end(), USAGE, "a group either makes communicators or has calls of them, and this one does both");
    assert_eq!(unsafe { (nccl.abort)(third) }, SUCCESS, "{}", last_error());
    drop(buffer);
    blocks.close();
    does_not.close();
}

#[test]
fn without_a_context() {
    nccl();
    std::thread::spawn(|| {
        let mut comm = std::ptr::null_mut();
        let id = unique_id();
        let code = unsafe { (nccl().init_rank)(&mut comm, 1, id, 0) };
        refused(code, USAGE, "this thread has no current CUDA context");
    })
    .join()
    .unwrap();
}
