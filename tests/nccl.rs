//! Ranks exchange bytes through NCCL: on the emulator through the stand-in `nccl_emu`, whose ranks are threads or
//! processes; with `DDPM_TEST_DEVICE=cuda` through the real library, on as many GPUs as there are. What ranks do that
//! fail, and libraries that are missing or wrong, is for the stand-in alone.

mod support;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
use std::time::{Duration, Instant};

use ddpm_cuda::device::cuda::nccl::{self, Communicator, Id, Patience};
use ddpm_cuda::device::cuda::{self, Buffer, Gpu, Repeated, View, ViewMut};
use ddpm_cuda::error::Result;
use ddpm_cuda::kernels;
use ddpm_cuda::tensor::DType;

use support::{gpu, places};

/// Longer than any rank of these tests works on its own.
const LONG: Duration = Duration::from_secs(60);

/// How many GPUs there are; none if kernels cannot be tested.
fn gpus() -> usize {
    static GPUS: OnceLock<usize> = OnceLock::new();
    *GPUS.get_or_init(|| {
        if kernels::COMPILER.is_some() && !gpu::is_real() {
            let nccl = places::nccl();
            let nccl = nccl.to_str().expect("a path in UTF-8");
            let silent = [("CUDA_EMU_LOG", "none"), ("NCCL_EMU_LOG", "none")];
            let own = [("CUDA_EMU_DEVICES", "4"), ("CUDA_EMU_MEMORY", "256M"), ("DDPM_NCCL", nccl)];
            for (name, value) in own.iter().chain(&silent).filter(|(name, _)| std::env::var_os(name).is_none()) {
                // SAFETY: every test comes here first, and nothing in this process reads or writes variables meanwhile.
                unsafe { std::env::set_var(name, value) };
            }
        }
        if gpu::available() { cuda::devices().expect("the driver is there").len() } else { 0 }
    })
}

/// True if there are `size` GPUs; says so if there are not.
fn enough(size: usize) -> bool {
    let there = gpus();
    if there > 0 && there < size {
        gpu::skip(&format!("an exchange of {size} ranks, since there are only {there} GPUs"));
    }
    there >= size
}

/// True on the emulator with `size` GPUs.
fn emulated(size: usize) -> bool {
    enough(size) && gpu::emulated("ranks that fail")
}

/// All ranks, in order.
fn everybody(ranks: &Communicator) -> Vec<usize> {
    (0..ranks.size()).collect()
}

fn patience() -> Patience {
    Patience { limit: LONG, cancel: Arc::default() }
}

/// Runs `work` for ranks that are threads, each with a GPU of its own.
fn together(size: usize, work: impl Fn(&Gpu, Communicator) + Sync) {
    let id = nccl::unique_id().unwrap();
    threads(size, |rank| {
        let gpu = Gpu::open(rank, DType::F32, false).unwrap();
        let ranks = Communicator::new(&gpu, rank, size, &id, patience()).unwrap();
        work(&gpu, ranks);
    });
}

/// Runs `work` in `count` threads and passes on the first panic.
fn threads(count: usize, work: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count).map(|number| scope.spawn(move || work(number))).collect();
        let panics: Vec<_> = threads.into_iter().filter_map(|thread| thread.join().err()).collect();
        if let Some(panic) = panics.into_iter().next() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn upload(gpu: &Gpu, numbers: &[f32]) -> Buffer {
    let mut buffer = gpu.alloc(4 * numbers.len()).unwrap();
    gpu.upload(&mut buffer, numbers).unwrap();
    buffer
}

fn download(gpu: &Gpu, buffer: &Buffer) -> Vec<f32> {
    let mut numbers = vec![0.0; buffer.bytes() / 4];
    gpu.download(&mut numbers, buffer).unwrap();
    numbers
}

fn all(buffer: &Buffer) -> View<'_> {
    View::new(buffer, 0, buffer.bytes())
}

fn all_mut(buffer: &mut Buffer) -> ViewMut<'_> {
    let bytes = buffer.bytes();
    ViewMut::new(buffer, 0, bytes)
}

/// Numbers that tell rank and place.
fn numbers(rank: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| (1000 * rank + i) as f32).collect()
}

/// The message of what must fail.
#[track_caller]
fn failure<T>(result: Result<T>) -> String {
    result.err().expect("it fails").to_string()
}

#[test]
fn the_library_says_what_it_is() {
    if !enough(1) {
        return;
    }
    let version = nccl::version().unwrap();
    assert_eq!(version.split('.').filter_map(|part| part.parse::<u32>().ok()).count(), 3, "{version}");
    assert_eq!(nccl::is_stand_in().unwrap(), !gpu::is_real());
    assert_ne!(nccl::unique_id().unwrap(), nccl::unique_id().unwrap());
}

#[test]
fn equal_parts_go_to_every_rank() {
    for size in [1, 2, 4] {
        if !enough(size) {
            return;
        }
        together(size, |gpu, ranks| {
            assert_eq!(ranks.size(), size);
            for part in [1, 5, 1000] {
                let from = upload(gpu, &numbers(ranks.rank(), size * part));
                let mut to = upload(gpu, &vec![-1.0; size * part]);
                ranks.all_to_all(all_mut(&mut to), all(&from), &everybody(&ranks)).unwrap();
                let own = ranks.rank() * part;
                let expected: Vec<f32> =
                    (0..size).flat_map(|rank| numbers(rank, size * part)[own..][..part].to_vec()).collect();
                assert_eq!(download(gpu, &to), expected, "{size} ranks, parts of {part}");
                assert_eq!(download(gpu, &from), numbers(ranks.rank(), size * part));
            }
            ranks.close().unwrap();
        });
    }
}

/// Some ranks exchange among themselves, while others do the same.
#[test]
fn some_of_the_ranks() {
    if !enough(4) {
        return;
    }
    together(4, |gpu, ranks| {
        let (rank, part) = (ranks.rank(), 3);
        for others in [[rank - rank % 2, rank - rank % 2 + 1], [rank % 2, rank % 2 + 2]] {
            let place = others.iter().position(|&other| other == rank).unwrap();
            let from = upload(gpu, &numbers(rank, 2 * part));
            let mut to = upload(gpu, &vec![-1.0; 2 * part]);
            ranks.all_to_all(all_mut(&mut to), all(&from), &others).unwrap();
            let parts = others.map(|other| numbers(other, 2 * part)[place * part..][..part].to_vec());
            assert_eq!(download(gpu, &to), parts.concat(), "rank {rank} and {others:?}");
            ranks.all_gather(all_mut(&mut to), &others).unwrap();
            // The k-th of them has sent its part k of what it had, which came from the k-th.
            let kept = others.map(|other| {
                let place = others.iter().position(|&one| one == other).unwrap();
                numbers(other, 2 * part)[place * part..][..part].to_vec()
            });
            assert_eq!(download(gpu, &to), kept.concat(), "rank {rank} and {others:?}, gathered");
        }
        ranks.close().unwrap();
    });
}

/// Parts, numbers and sums reach every rank, in the middle of buffers whose other elements stay as they are.
#[test]
fn ranges_of_buffers_are_gathered_spread_and_added_up() {
    for size in [1, 2, 4] {
        if !enough(size) {
            return;
        }
        together(size, |gpu, ranks| {
            let (rank, part) = (ranks.rank(), 7);
            let whole = size * part;
            let around = |inner: Vec<f32>| [vec![-1.0; 3], inner, vec![-2.0; 2]].concat();

            let mut own = vec![-3.0; whole];
            own[rank * part..][..part].copy_from_slice(&numbers(rank, part));
            let mut buffer = upload(gpu, &around(own));
            ranks.all_gather(ViewMut::new(&mut buffer, 12, 4 * whole), &everybody(&ranks)).unwrap();
            let gathered: Vec<f32> = (0..size).flat_map(|rank| numbers(rank, part)).collect();
            assert_eq!(download(gpu, &buffer), around(gathered));

            let mut buffer = upload(gpu, &around(numbers(rank, whole)));
            ranks.broadcast(ViewMut::new(&mut buffer, 12, 4 * whole), size - 1).unwrap();
            assert_eq!(download(gpu, &buffer), around(numbers(size - 1, whole)));

            let mut buffer = upload(gpu, &around(numbers(rank, whole)));
            ranks.all_reduce(ViewMut::new(&mut buffer, 12, 4 * whole)).unwrap();
            let sums = (0..whole).map(|i| (0..size).map(|rank| numbers(rank, whole)[i]).sum()).collect();
            assert_eq!(download(gpu, &buffer), around(sums));
            ranks.close().unwrap();
        });
    }
}

/// An exchange runs in the order of the stream: after what writes the bytes, before what reads them.
#[test]
fn the_exchange_is_in_the_order_of_the_stream() {
    if !enough(2) {
        return;
    }
    together(2, |gpu, ranks| {
        let rank = ranks.rank();
        let mut buffer = gpu.alloc(4 * 2000).unwrap();
        let mut copy = gpu.alloc(4 * 2000).unwrap();
        for round in 1..=5u32 {
            gpu.fill(&mut buffer, 4 * 1000 * rank, 1000, 10 * round + rank as u32).unwrap();
            ranks.all_gather(all_mut(&mut buffer), &everybody(&ranks)).unwrap();
            gpu.copy(&mut copy, 0, &buffer).unwrap();
            gpu.fill(&mut buffer, 0, 2000, 7).unwrap();
            let mut words = vec![0u32; 2000];
            gpu.download(&mut words, &copy).unwrap();
            assert_eq!(words, [vec![10 * round; 1000], vec![10 * round + 1; 1000]].concat());
        }
        ranks.wait().unwrap();
        ranks.close().unwrap();
    });
}

/// Work with an exchange in it is captured and replayed as other work is.
#[test]
fn an_exchange_is_replayed_in_a_graph() {
    if !enough(2) {
        return;
    }
    together(2, |gpu, ranks| {
        let rank = ranks.rank();
        let mut from = gpu.alloc(4 * 8).unwrap();
        let mut to = gpu.alloc(4 * 8).unwrap();
        let mut copy = gpu.alloc(4 * 8).unwrap();
        let mut work = Repeated::new("an exchange");
        for round in 0..5 {
            let own: Vec<f32> = numbers(rank, 8).iter().map(|x| x + 100.0 * round as f32).collect();
            gpu.upload(&mut from, &own).unwrap();
            let run = || {
                ranks.all_to_all(all_mut(&mut to), all(&from), &everybody(&ranks))?;
                gpu.copy(&mut copy, 0, &to)
            };
            work.run(gpu, run).unwrap();
            let expected: Vec<f32> = (0..2).flat_map(|of| numbers(of, 8)[4 * rank..][..4].to_vec()).collect();
            let expected: Vec<f32> = expected.iter().map(|x| x + 100.0 * round as f32).collect();
            assert_eq!(download(gpu, &copy), expected, "round {round}");
        }
        assert_eq!(gpu.graph_launches(), 4, "the first round warms up: {:?}", gpu.take_notes());
        // A graph that is there keeps the communicator from its end.
        drop(work);
        ranks.close().unwrap();
    });
}

/// Two communicators on each GPU: four ranks in two rows and two columns, as GPUs in machines are.
#[test]
fn rows_and_columns() {
    if !enough(4) {
        return;
    }
    let ids: [Id; 4] = std::array::from_fn(|_| nccl::unique_id().unwrap());
    threads(4, |number| {
        let (row, column) = (number / 2, number % 2);
        let gpu = Gpu::open(number, DType::F32, false).unwrap();
        let in_row = Communicator::new(&gpu, column, 2, &ids[row], patience()).unwrap();
        let in_column = Communicator::new(&gpu, row, 2, &ids[2 + column], patience()).unwrap();
        let mut buffer = upload(&gpu, &[0.0; 4]);
        gpu.fill(&mut buffer, 4 * number, 1, (1.0 + number as f32).to_bits()).unwrap();
        in_row.all_reduce(all_mut(&mut buffer)).unwrap();
        in_column.all_reduce(all_mut(&mut buffer)).unwrap();
        assert_eq!(download(&gpu, &buffer), [1.0, 2.0, 3.0, 4.0]);
        in_row.close().unwrap();
        in_column.close().unwrap();
    });
}

/// A rank that does not come: the wait ends when the patience does, and so does everything after it, with one reason.
#[test]
fn a_wait_ends_with_the_patience() {
    if !emulated(2) {
        return;
    }
    let over = Barrier::new(2);
    together(2, |gpu, ranks| {
        if ranks.rank() == 1 {
            over.wait();
            return;
        }
        let mut buffer = upload(gpu, &[1.0; 4]);
        ranks.set_limit(Duration::from_millis(300));
        let start = Instant::now();
        let said = failure(ranks.all_gather(all_mut(&mut buffer), &everybody(&ranks)));
        let words =
            "rank 0 of 2: all_gather of 2 parts of 8 bytes has lasted 0.3 s: another rank is slow, hangs or is gone";
        assert_eq!(said, words);
        assert!(start.elapsed() >= Duration::from_millis(300) && start.elapsed() < LONG, "{:?}", start.elapsed());
        assert_eq!(failure(ranks.broadcast(all_mut(&mut buffer), 0)), words);
        assert_eq!(failure(gpu.synchronize()), words);
        assert_eq!(failure(gpu.download(&mut [0.0f32; 4], &buffer)), words);
        assert_eq!(failure(ranks.close()), words);
        over.wait();
    });
}

/// The same when ranks do not come together at all.
#[test]
fn a_rank_that_never_arrives() {
    if !emulated(1) {
        return;
    }
    let gpu = Gpu::open(0, DType::F32, false).unwrap();
    let short = Patience { limit: Duration::from_millis(200), cancel: Arc::default() };
    let said = failure(Communicator::new(&gpu, 0, 2, &nccl::unique_id().unwrap(), short));
    let words = "rank 0 of 2: meeting the other ranks has lasted 0.2 s: another rank is slow, hangs or is gone";
    assert_eq!(said, words);
    let cancelled = Patience { limit: LONG, cancel: Arc::new(AtomicBool::new(true)) };
    let said = failure(Communicator::new(&gpu, 1, 2, &nccl::unique_id().unwrap(), cancelled));
    assert_eq!(said, "rank 1 of 2: meeting the other ranks was cancelled");
    // The GPU is as good as new.
    let ranks = Communicator::new(&gpu, 0, 1, &nccl::unique_id().unwrap(), patience()).unwrap();
    let mut buffer = upload(&gpu, &[5.0]);
    ranks.all_reduce(all_mut(&mut buffer)).unwrap();
    assert_eq!(download(&gpu, &buffer), [5.0]);
    ranks.close().unwrap();
}

/// Another thread knows better: by a flag, or with a reason.
#[test]
fn another_thread_ends_a_wait() {
    if !emulated(2) {
        return;
    }
    for with_a_reason in [false, true] {
        let (id, over) = (nccl::unique_id().unwrap(), Barrier::new(2));
        threads(2, |rank| {
            let gpu = Gpu::open(rank, DType::F32, false).unwrap();
            let cancel = Arc::new(AtomicBool::new(false));
            let patience = Patience { limit: LONG, cancel: cancel.clone() };
            let ranks = Communicator::new(&gpu, rank, 2, &id, patience).unwrap();
            if rank == 1 {
                over.wait();
                return;
            }
            let mut buffer = upload(&gpu, &[1.0; 4]);
            let aborter = ranks.aborter();
            let said = std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(100));
                    match with_a_reason {
                        true => assert!(aborter.abort("rank 1 on host b is out of memory")),
                        false => cancel.store(true, Ordering::Relaxed),
                    }
                });
                failure(ranks.all_gather(all_mut(&mut buffer), &everybody(&ranks)))
            });
            match with_a_reason {
                true => assert_eq!(said, "rank 0 of 2: rank 1 on host b is out of memory"),
                false => assert_eq!(said, "rank 0 of 2: all_gather of 2 parts of 8 bytes was cancelled"),
            }
            assert!(aborter.abort("once more"), "nothing is left to abort");
            over.wait();
        });
    }
}

/// On the emulator a graph with an exchange runs in the call that launches it, which only another thread can end.
#[test]
fn another_thread_ends_the_wait_of_a_graph() {
    if !emulated(2) {
        return;
    }
    let over = Barrier::new(2);
    together(2, |gpu, ranks| {
        let mut buffer = upload(gpu, &[1.0; 4]);
        let mut work = Repeated::new("an exchange");
        for _ in 0..2 {
            work.run(gpu, || ranks.all_gather(all_mut(&mut buffer), &everybody(&ranks))).unwrap();
        }
        assert_eq!(gpu.graph_launches(), 1);
        gpu.synchronize().unwrap();
        if ranks.rank() == 1 {
            over.wait();
            return;
        }
        let aborter = ranks.aborter();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                assert!(aborter.abort("rank 1 has left the training"));
            });
            // Whether the launch itself knows of it or what comes after it.
            let launched = work.run(gpu, || ranks.all_gather(all_mut(&mut buffer), &everybody(&ranks)));
            assert_eq!(failure(launched.and_then(|()| gpu.synchronize())), "rank 0 of 2: rank 1 has left the training");
        });
        over.wait();
    });
}

/// Calls that differ are an error on both sides, with both sides named.
#[test]
fn ranks_that_do_not_agree() {
    if !emulated(2) {
        return;
    }
    together(2, |gpu, ranks| {
        let rank = ranks.rank();
        let mut buffer = upload(gpu, &vec![1.0; 4 + 2 * rank]);
        let said = failure(ranks.all_gather(all_mut(&mut buffer), &everybody(&ranks)));
        let parts = [8, 12][rank];
        let words = format!(
            "rank {rank} of 2: all_gather of 2 parts of {parts} bytes failed with code 5 of NCCL, invalid usage (run with \
             NCCL_DEBUG=WARN for details): call 1: rank 0 all-gathers 8 u8, rank 1 12 u8"
        );
        assert_eq!(said, words);
        assert_eq!(failure(gpu.synchronize()), words);
    });
}

/// A rank that drops its communicator without closing it: the others learn of it.
#[test]
fn a_rank_that_leaves() {
    if !emulated(2) {
        return;
    }
    // Not before the other has met it.
    let met = Barrier::new(2);
    together(2, |gpu, ranks| {
        met.wait();
        if ranks.rank() == 1 {
            return drop(ranks);
        }
        let mut buffer = upload(gpu, &[1.0; 4]);
        let said = failure(ranks.all_gather(all_mut(&mut buffer), &everybody(&ranks)));
        let words = "failed with code 6 of NCCL, remote process exited or there was a network error: rank 1 (process ";
        assert!(said.contains(words) && said.ends_with(") has aborted its communicator"), "{said}");
    });
}

/// Parts that cannot be equal are the program's fault, named by both numbers.
#[test]
fn parts_are_equal() {
    if !emulated(2) {
        return;
    }
    let ranks = || {
        together(2, |gpu, ranks| {
            let mut buffer = gpu.alloc(21).unwrap();
            ranks.all_gather(all_mut(&mut buffer), &everybody(&ranks)).unwrap();
        });
    };
    let panicked = std::panic::catch_unwind(ranks).expect_err("21 bytes have no two equal parts");
    assert_eq!(panicked.downcast_ref::<String>().unwrap(), "all_gather: 21 bytes for 2 ranks");
}

const ROLE: &str = "DDPM_CUDA_TEST_RUN";
const RANK: &str = "DDPM_TEST_RANK";
const ID: &str = "DDPM_TEST_ID";

/// What a child process does; in the parent, where no role is set, there is nothing to do.
#[test]
fn roles() {
    match std::env::var(ROLE).as_deref() {
        Err(_) => {}
        Ok("version") => match nccl::version() {
            Ok(version) => println!("\nNCCL {version}"),
            Err(e) => println!("\n{e}"),
        },
        Ok("sums") => {
            assert!(gpus() > 0);
            let rank: usize = std::env::var(RANK).unwrap().parse().unwrap();
            let gpu = Gpu::open(rank, DType::F32, false).unwrap();
            let digits = std::env::var(ID).unwrap();
            let id = std::array::from_fn(|at| u8::from_str_radix(&digits[2 * at..][..2], 16).unwrap());
            let ranks = Communicator::new(&gpu, rank, 3, &id, patience()).unwrap();
            let sums = || -> Result<Vec<f32>> {
                let (mut buffer, mut sums) = (gpu.alloc(12)?, vec![0.0; 3]);
                gpu.upload(&mut buffer, &numbers(rank, 3))?;
                ranks.all_reduce(all_mut(&mut buffer))?;
                gpu.download(&mut sums, &buffer)?;
                Ok(sums)
            };
            for _ in 0..5 {
                match sums() {
                    Ok(sums) => println!("\nsums: {sums:?}"),
                    Err(e) => return println!("\nfails: {e}"),
                }
            }
            ranks.close().unwrap();
        }
        Ok(role) => panic!("no role {role}"),
    }
}

/// A process in a role.
fn child(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "roles", "--nocapture"]).env(ROLE, role).env("CUDA_EMU_LOG", "none");
    command
}

/// The lines that it prints and that begin with `word`.
fn lines(output: &Output, word: &str) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| line.starts_with(word)).map(String::from).collect()
}

/// One of three processes is killed in the middle of a call: the others say which.
#[test]
fn a_process_that_is_killed_is_named() {
    if !emulated(3) {
        return;
    }
    let id: String = nccl::unique_id().unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    let start = |rank: usize| {
        let mut command = child("sums");
        command.env(RANK, rank.to_string()).env(ID, &id).env("NCCL_EMU_FAIL", "rank=1,call=3,as=kill");
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..3).map(start).collect();
    let killed = children[1].id();
    let outputs: Vec<Output> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    assert!(!outputs[1].status.success());
    for (rank, output) in outputs.iter().enumerate() {
        let sums = lines(output, "sums: ");
        assert!(sums.iter().all(|sums| sums == "sums: [3000.0, 3003.0, 3006.0]"), "rank {rank}: {output:?}");
        // The others may hear of its end before they have read the sum of the call before.
        assert!(sums.len() == 2 || rank != 1 && sums.len() == 1, "rank {rank}: {output:?}");
        let said = lines(output, "fails: ").concat();
        if rank != 1 {
            let (begins, code) = (format!("fails: rank {rank} of 3: "), " failed with code 6 of NCCL, ");
            let words = format!(": rank 1 (process {killed} on ");
            assert!(said.starts_with(&begins) && said.contains(code) && said.contains(&words), "{said}");
        }
    }
}

/// What `version` says in a process with another library.
fn version_with(nccl: &Path, settings: &[(&str, &str)]) -> String {
    let output = child("version").env("DDPM_NCCL", nccl).envs(settings.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = text.lines().skip_while(|line| !line.starts_with("running")).nth(2).map(String::from);
    said.unwrap_or_else(|| panic!("nothing was said: {text}"))
}

#[cfg(target_os = "linux")]
#[test]
fn libraries_that_are_no_nccl() {
    let (nccl, folder) = (places::nccl(), tempfile::tempdir().unwrap());
    assert_eq!(version_with(&nccl, &[]), "NCCL 2.30.3");
    let missing = folder.path().join("libnccl.so.2");
    let said = version_with(&missing, &[]);
    assert!(said.starts_with(&format!("{}: is no NCCL that can be opened: ", missing.display())), "{said}");
    std::fs::write(&missing, "#!/bin/sh\n").unwrap();
    let said = version_with(&missing, &[]);
    assert!(said.starts_with(&format!("{}: is no NCCL that can be opened: ", missing.display())), "{said}");
    let other = places::emulator();
    let words = "is a library but not NCCL: it has no ncclGetVersion; give the path of libnccl.so.2";
    assert_eq!(version_with(&other, &[]), format!("{}: {words}", other.display()));
    let said = version_with(&nccl, &[("NCCL_EMU_VERSION", "2.13.4")]);
    assert_eq!(said, format!("{}: is NCCL 2.13.4, but 2.14 or newer is needed: update it", nccl.display()));
    let said = version_with(&nccl, &[("NCCL_EMU_SEED", "many")]);
    assert_eq!(said, format!("{}: does not say which NCCL it is: ncclGetVersion returns 4", nccl.display()));
}

/// Without a path the system's library is taken. Where there is none, a sentence says how to get one.
#[test]
fn no_library_at_all() {
    let said = version_with(Path::new(""), &[]);
    let none = "several GPUs need NCCL, and there is no libnccl.so.2: install the package libnccl2, or `python3 -m pip \
                install nvidia-nccl-cu12` and set DDPM_NCCL to the path of its libnccl.so.2";
    assert!(said == none || said.starts_with("NCCL 2."), "{said}");
}
