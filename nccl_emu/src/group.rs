//! Groups: calls between `ncclGroupStart` and `ncclGroupEnd` are one. A call outside is a group of its own.
//!
//! Every communicator's part runs in a thread of its own, since the ranks of one process may wait for each other.
//! Captured parts do not wait and stay on the calling thread.

use std::sync::{Arc, Mutex, Once};
use std::thread::ThreadId;

use crate::batch::{Asked, Batch};
use crate::codes::{Answer, Code, Refusal, refuse};
use crate::comm::{Comm, lock};
use crate::settings::{Log, log};
use crate::wire::Meeting;

/// An open group of a thread.
#[derive(Default)]
struct Group {
    depth: usize,
    /// Why it will not run.
    failed: Option<Refusal>,
    parts: Parts,
}

/// What a group has.
#[derive(Default)]
struct Parts {
    inits: Vec<(Arc<Comm>, Meeting)>,
    calls: Vec<(Arc<Comm>, Vec<Asked>)>,
}

/// Open groups by thread. In a table of the process, not of the threads, so that those left open can be named.
static GROUPS: Mutex<Vec<(ThreadId, Group)>> = Mutex::new(Vec::new());

/// What `work` makes of the calling thread's open group; `None` if it has none.
fn with_open<T>(work: impl FnOnce(&mut Group) -> T) -> Option<T> {
    let here = std::thread::current().id();
    lock(&GROUPS).iter_mut().find(|(thread, _)| *thread == here).map(|(_, group)| work(group))
}

extern "C" fn report_open_groups() {
    for (thread, group) in lock(&GROUPS).iter().filter(|_| log() != Log::None) {
        let calls: usize = group.parts.calls.iter().map(|(_, calls)| calls.len()).sum();
        eprintln!("nccl_emu: the process ends while {thread:?} has a group open: its {calls} calls have never run");
    }
}

/// `ncclGroupStart`.
pub fn start() {
    static REPORTS: Once = Once::new();
    // SAFETY: the function takes nothing and reads a static, at the end of the process.
    REPORTS.call_once(|| unsafe {
        // Without a report the group is left open all the same.
        let _ = libc::atexit(report_open_groups);
    });
    if with_open(|group| group.depth += 1).is_none() {
        lock(&GROUPS).push((std::thread::current().id(), Group { depth: 1, ..Group::default() }));
    }
}

/// `ncclGroupEnd`.
pub fn end() -> Answer<Code> {
    let Some(depth) = with_open(|group| {
        group.depth -= 1;
        group.depth
    }) else {
        return refuse(Code::USAGE, "ncclGroupEnd without ncclGroupStart on this thread");
    };
    if depth > 0 {
        return Ok(Code::SUCCESS);
    }
    let here = std::thread::current().id();
    let group = {
        let mut groups = lock(&GROUPS);
        let at = groups.iter().position(|(thread, _)| *thread == here);
        at.map(|at| groups.swap_remove(at).1).unwrap_or_default()
    };
    group.parts.calls.iter().for_each(|(comm, _)| comm.set_grouped(false));
    if let Some(failed) = group.failed {
        let message = format!("the group does not run, since one of its calls was refused: {}", failed.message);
        return refuse(failed.code, message);
    }
    let comms = group.parts.comms();
    let _inside = comms.iter().map(|comm| comm.enter("ncclGroupEnd")).collect::<Answer<Vec<_>>>()?;
    group.parts.run()
}

/// A call was refused: the open group, if there is one, will not run.
pub fn spoil(refusal: &Refusal) {
    with_open(|group| group.failed.get_or_insert_with(|| refusal.clone()).code);
}

/// Adds a call to the open group, or runs it.
pub fn call(comm: &Arc<Comm>, asked: Asked) -> Answer<Code> {
    let grouped = with_open(|group| {
        comm.set_grouped(true);
        let calls = &mut group.parts.calls;
        match calls.iter_mut().find(|(other, _)| other.handle == comm.handle) {
            Some((_, calls)) => calls.push(asked),
            None => calls.push((comm.clone(), vec![asked])),
        }
    });
    match grouped {
        Some(()) => Ok(Code::SUCCESS),
        None => Parts { inits: Vec::new(), calls: vec![(comm.clone(), vec![asked])] }.run(),
    }
}

/// Adds communicators that are to connect to the open group, or connects them.
pub fn init(inits: Vec<(Arc<Comm>, Meeting)>) -> Answer<Code> {
    let mut inits = Some(inits);
    with_open(|group| group.parts.inits.extend(inits.take().unwrap_or_default()));
    match inits {
        None => Ok(Code::SUCCESS),
        Some(inits) => Parts { inits, calls: Vec::new() }.run(),
    }
}

impl Parts {
    fn comms(&self) -> Vec<Arc<Comm>> {
        let (inits, calls) = (self.inits.iter().map(|part| &part.0), self.calls.iter().map(|part| &part.0));
        inits.chain(calls).cloned().collect()
    }

    fn run(self) -> Answer<Code> {
        if !self.inits.is_empty() && !self.calls.is_empty() {
            return refuse(
                Code::USAGE,
                "a group either makes communicators or has calls of them, and this one does both",
            );
        }
        let comms = self.comms();
        let waits = comms.iter().all(|comm| comm.blocking);
        if comms.iter().any(|comm| comm.blocking) && !waits {
            return refuse(Code::ARGUMENT, "a group has blocking communicators and others that are not");
        }
        let batches = self.calls.into_iter().map(|(comm, asked)| Batch::new(&comm, asked).map(|batch| (batch, comm)));
        let batches = batches.collect::<Answer<Vec<_>>>()?;
        let mut jobs = Vec::new();
        for (comm, meeting) in self.inits {
            jobs.push(comm.start("ncclCommInitRank", move |comm| comm.connect(meeting))?);
        }
        for (batch, comm) in batches {
            if batch.captured {
                batch.capture()?;
            } else {
                jobs.push(comm.start("an earlier call", move |_| batch.run())?);
            }
        }
        if !waits && !jobs.is_empty() {
            return Ok(Code::IN_PROGRESS);
        }
        let mut first = Ok(Code::SUCCESS);
        for job in jobs {
            // A panic inside has become a refusal already.
            let done = job.join().unwrap_or_else(|_| refuse(Code::INTERNAL, "a thread has panicked"));
            first = first.and_then(|code| done.map(|()| code));
        }
        first
    }
}
