//! What one group asks of one communicator, as work of a stream: what the calls give away is copied to the host, the
//! places for what they get are set to NaN, a host function exchanges the bytes, and what has arrived is copied to the
//! device. A host function must not call the driver, and this one does not. The same work can be captured: a graph has
//! the copies and the host function as nodes, and exchanges anew each time that it is launched.

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex};

use crate::call::{Call, Kind, Op, Type};
use crate::codes::{Answer, Code, refusal, refuse};
use crate::comm::{Block, Comm, Part, Way, lock};
use crate::driver;

/// A range of device memory.
#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    bytes: u64,
}

impl Range {
    fn overlaps(self, other: Range) -> bool {
        self.bytes > 0
            && other.bytes > 0
            && self.start < other.start + other.bytes
            && other.start < self.start + self.bytes
    }
}

/// A call that has been looked at, in so far as it can be alone.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    function: &'static str,
    call: Call,
    sends: Range,
    receives: Range,
    stream: usize,
}

/// The arguments of a call, as the program has passed them.
pub struct Arguments {
    pub function: &'static str,
    pub kind: Kind,
    pub from: *const c_void,
    pub to: *mut c_void,
    pub count: usize,
    pub dtype: c_int,
    pub op: c_int,
    /// The other rank or the root.
    pub other: c_int,
    pub stream: *mut c_void,
}

impl Asked {
    /// Refuses arguments that cannot be meant.
    pub fn new(comm: &Comm, arguments: &Arguments) -> Answer<Asked> {
        const PER_THREAD: usize = 2;
        let Arguments { function, kind, count, .. } = *arguments;
        let Some(dtype) = Type::from_number(arguments.dtype) else {
            let what =
                format!("{function}: type {} is none that this library has: 0 (i8) to 9 (bf16)", arguments.dtype);
            return refuse(Code::ARGUMENT, what);
        };
        let Some(op) = Op::from_number(arguments.op) else {
            let what =
                format!("{function}: operator {} is none that this library has: 0 (sum) to 4 (average)", arguments.op);
            return refuse(Code::ARGUMENT, what);
        };
        let other = u32::try_from(arguments.other).ok().filter(|&other| other < comm.size).ok_or_else(|| {
            let what =
                format!("{function}: there is no rank {}: it must be from 0 to {}", arguments.other, comm.size - 1);
            refusal(Code::ARGUMENT, what)
        })?;
        if arguments.stream.addr() == PER_THREAD {
            return refuse(Code::ARGUMENT, format!("{function}: the default stream per thread is not emulated"));
        }
        let call = Call { number: 0, kind, count: count as u64, dtype, op, other, captured: false, place: (0, 0) };
        let sizes = (call.sends(comm.rank, comm.size), call.receives(comm.rank, comm.size));
        let (Some(sends), Some(receives)) = sizes else {
            return refuse(Code::ARGUMENT, format!("{function}: {count} elements are more than any memory has"));
        };
        let range = |pointer: *const c_void, bytes, what| {
            let range = Range { start: pointer.addr() as u64, bytes };
            check_range(comm, function, range, dtype, what).map(|()| range)
        };
        Ok(Asked {
            function,
            call,
            sends: range(arguments.from, sends, "what it sends")?,
            receives: range(arguments.to, receives, "where it receives")?,
            stream: arguments.stream.addr(),
        })
    }

    /// True if it may read what it writes, in the one way that NCCL defines.
    fn is_in_place(&self, rank: u32) -> bool {
        let (from, to) = (self.sends, self.receives);
        match self.call.kind {
            Kind::Broadcast | Kind::AllReduce | Kind::Reduce => from.start == to.start,
            Kind::AllGather => from.start == to.start + u64::from(rank) * from.bytes,
            Kind::ReduceScatter => to.start == from.start + u64::from(rank) * to.bytes,
            Kind::Send | Kind::Recv => false,
        }
    }
}

/// Refuses memory that is not inside one allocation of the communicator's device.
fn check_range(comm: &Comm, function: &str, range: Range, dtype: Type, what: &str) -> Answer {
    let Range { start, bytes } = range;
    if bytes == 0 {
        return Ok(());
    }
    let refused = |why: String| refuse(Code::ARGUMENT, format!("{function}, {what}: {why}"));
    if start == 0 {
        return refused(format!("the pointer to {bytes} bytes is null"));
    }
    if !start.is_multiple_of(dtype.size()) {
        return refused(format!("{start:#x} is no multiple of an element's {} bytes", dtype.size()));
    }
    let Some(allocation) = driver::allocation(start)? else {
        return refused(format!("{start:#x} is no memory of the driver"));
    };
    if !allocation.on_device {
        return refused(format!("{start:#x} is memory of the host, which this library does not take"));
    }
    if allocation.device != comm.device {
        let (is, needed, rank) = (allocation.device, comm.device, comm.rank);
        return refused(format!("{start:#x} is on device {is}, but rank {rank} is on device {needed}"));
    }
    let room = allocation.bytes - (start - allocation.start);
    if bytes > room {
        let (whole, first) = (allocation.bytes, allocation.start);
        return refused(format!(
            "{bytes} bytes at {start:#x} end {} bytes behind their allocation of {whole} bytes at {first:#x}",
            bytes - room
        ));
    }
    Ok(())
}

/// Calls of one communicator that are given to a stream together.
pub struct Batch {
    comm: Arc<Comm>,
    asked: Vec<Asked>,
    stream: usize,
    pub captured: bool,
    /// Number of the first call; calls of a graph are numbered when it is launched.
    first: u64,
    /// What the calls give away, one behind the other.
    outgoing: Block,
    /// What they get.
    incoming: Block,
    /// Held by the host function that uses the blocks.
    exchanging: Mutex<()>,
}

impl Batch {
    /// Refuses calls that cannot be meant together.
    pub fn new(comm: &Arc<Comm>, mut asked: Vec<Asked>) -> Answer<Arc<Batch>> {
        let rank = comm.rank;
        let stream = asked.first().map_or(0, |asked| asked.stream);
        if let Some(other) = asked.iter().find(|other| other.stream != stream) {
            let what = format!(
                "{}: the calls of a group are on two streams of rank {rank}, {stream:#x} and {:#x}: this library takes one",
                other.function, other.stream
            );
            return refuse(Code::USAGE, what);
        }
        let context = driver::context_of(stream)?;
        if context != comm.context {
            let what = format!("stream {stream:#x} is of another context than the communicator of rank {rank}");
            return refuse(Code::ARGUMENT, what);
        }
        let captured = driver::is_capturing(stream)?;
        check_overlaps(rank, &asked)?;
        let to_itself = |kind| asked.iter().filter(|asked| asked.call.kind == kind && asked.call.other == rank).count();
        let (sent, received) = (to_itself(Kind::Send), to_itself(Kind::Recv));
        if sent != received {
            let what = format!(
                "rank {rank} sends {sent} times to itself in one group, and receives {received} times: nobody else can do \
                 the rest"
            );
            return refuse(Code::USAGE, what);
        }
        let collectives = asked.iter().filter(|asked| asked.call.kind.is_collective()).count() as u32;
        let mut place = 0;
        let first = if captured { 0 } else { comm.number(asked.len()) };
        for (Asked { call, .. }, number) in asked.iter_mut().zip(first..) {
            (call.number, call.captured) = (number, captured);
            if call.kind.is_collective() {
                place += 1;
                call.place = (place, collectives);
            }
        }
        let outgoing = comm.take_block(Way::Out, total(&asked, |asked| asked.sends))?;
        let incoming = comm.take_block(Way::In, total(&asked, |asked| asked.receives))?;
        let (comm, exchanging) = (comm.clone(), Mutex::new(()));
        Ok(Arc::new(Batch { comm, asked, stream, captured, first, outgoing, incoming, exchanging }))
    }

    /// Gives the work to the stream, on a thread of its own. If the driver works at once, as the emulator does, the
    /// exchange is over when this returns, unless nothing is received.
    pub fn run(self: &Arc<Self>) -> Answer {
        driver::make_current(self.comm.context)?;
        self.comm.begin_batch(self.stream)?;
        let given = self.copy_out().and_then(|()| {
            // SAFETY: the function takes back the handle that it is given, once.
            unsafe { self.call_on_host(exchange_once) }?;
            self.copy_in()?;
            // SAFETY: as above.
            unsafe { self.call_on_host(end) }
        });
        given.inspect_err(|_| self.comm.end_batch())?;
        self.comm.still_there()
    }

    /// The same as nodes of a graph, which owns the batch.
    pub fn capture(self: &Arc<Self>) -> Answer {
        self.comm.count_captured(true);
        let data = Arc::into_raw(self.clone());
        // SAFETY: `forget` takes back the handle that it is given; the graph calls it once.
        unsafe { driver::tie_to_capture(self.stream, data.cast_mut().cast(), forget) }?;
        self.copy_out()?;
        // SAFETY: as long as the graph is there, which calls the function, it owns a handle of the batch.
        unsafe { driver::call_on_host(self.stream, exchange_again, data.cast_mut().cast()) }?;
        self.copy_in()
    }

    /// Copies to the host, and then sets the places for what arrives to NaN: in place they are the same.
    fn copy_out(&self) -> Answer {
        let mut at = 0;
        for Range { start, bytes } in self.asked.iter().map(|asked| asked.sends).filter(|range| range.bytes > 0) {
            let bytes = bytes as usize;
            // SAFETY: the block is as long as all of them together, and the batch lives until the stream has passed it
            // or the graph is gone. The range is inside an allocation, which the program keeps, as NCCL demands.
            unsafe { driver::copy_to_host(self.outgoing.start.add(at), start, bytes, self.stream) }?;
            at += bytes;
        }
        for Range { start, bytes } in self.asked.iter().map(|asked| asked.receives).filter(|range| range.bytes > 0) {
            // SAFETY: as above.
            unsafe { driver::poison(start, bytes as usize, self.stream) }?;
        }
        Ok(())
    }

    fn copy_in(&self) -> Answer {
        let mut at = 0;
        for Range { start, bytes } in self.asked.iter().map(|asked| asked.receives).filter(|range| range.bytes > 0) {
            let bytes = bytes as usize;
            // SAFETY: as in `copy_out`.
            unsafe { driver::copy_to_device(start, self.incoming.start.add(at), bytes, self.stream) }?;
            at += bytes;
        }
        Ok(())
    }

    /// Lets the stream call `function` with a handle of this batch.
    ///
    /// # Safety
    /// The function takes the handle back.
    unsafe fn call_on_host(self: &Arc<Self>, function: driver::HostFunction) -> Answer {
        let data = Arc::into_raw(self.clone());
        // SAFETY: it is called once, if this succeeds.
        let given = unsafe { driver::call_on_host(self.stream, function, data.cast_mut().cast()) };
        given.inspect_err(|_| {
            // SAFETY: the handle of just now, which the driver has refused.
            drop(unsafe { Arc::from_raw(data) });
        })
    }

    /// What the host function does: exchanges the bytes of the block, and nothing with the driver.
    fn exchange(&self) {
        let _alone = lock(&self.exchanging);
        // SAFETY: each block has as many bytes as its side of all calls. The stream has written the outgoing ones and
        // will read the others; it does nothing while this function runs, and no other call of it runs meanwhile.
        let (outgoing, incoming) = unsafe {
            let (out, incoming) = (total(&self.asked, |asked| asked.sends), total(&self.asked, |asked| asked.receives));
            self.incoming.start.write_bytes(u8::MAX, incoming);
            (
                std::slice::from_raw_parts_mut(self.outgoing.start, out),
                std::slice::from_raw_parts_mut(self.incoming.start, incoming),
            )
        };
        let first = if self.captured { self.comm.number(self.asked.len()) } else { self.first };
        let part = |(asked, number): (&Asked, u64)| Part {
            call: Call { number, ..asked.call },
            sends: asked.sends.bytes as usize,
            receives: asked.receives.bytes as usize,
        };
        let parts: Vec<Part> = self.asked.iter().zip(first..).map(part).collect();
        let exchange = || self.comm.exchange(&parts, outgoing, incoming);
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(exchange));
        if let Err(refusal) = done.unwrap_or_else(|_| refuse(Code::INTERNAL, "an exchange has panicked")) {
            self.comm.fail(refusal);
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.comm.give_block(std::mem::replace(&mut self.outgoing, Block::empty(Way::Out)));
        self.comm.give_block(std::mem::replace(&mut self.incoming, Block::empty(Way::In)));
    }
}

/// Bytes of one side of all calls.
fn total(asked: &[Asked], side: fn(&Asked) -> Range) -> usize {
    asked.iter().map(|asked| side(asked).bytes as usize).sum()
}

/// Refuses calls of one group of which one writes what another, or itself, reads or writes.
fn check_overlaps(rank: u32, asked: &[Asked]) -> Answer {
    for (at, one) in asked.iter().enumerate() {
        if one.receives.overlaps(one.sends) && !one.is_in_place(rank) {
            let what = format!(
                "{}: rank {rank} {} to {:#x} from {:#x}, which overlap, but not as an operation in place",
                one.function,
                one.call.words(),
                one.receives.start,
                one.sends.start
            );
            return refuse(Code::ARGUMENT, what);
        }
        for (other_at, other) in asked.iter().enumerate().filter(|(other_at, _)| *other_at != at) {
            let twice = one.receives.overlaps(other.receives);
            if twice || one.receives.overlaps(other.sends) {
                let what = format!(
                    "{}: call {} of a group of rank {rank} writes {} bytes at {:#x}, which its call {} {}",
                    one.function,
                    at + 1,
                    one.receives.bytes,
                    one.receives.start,
                    other_at + 1,
                    if twice { "writes too" } else { "reads" }
                );
                return refuse(Code::USAGE, what);
            }
        }
    }
    Ok(())
}

/// A host function for work that runs once.
///
/// # Safety
/// `data` is a handle of a batch, which is taken back.
unsafe extern "C" fn exchange_once(data: *mut c_void) {
    // SAFETY: guaranteed by the caller.
    unsafe { Arc::from_raw(data.cast_const().cast::<Batch>()) }.exchange();
}

/// A host function of a graph.
///
/// # Safety
/// `data` is a handle of a batch, which is kept.
unsafe extern "C" fn exchange_again(data: *mut c_void) {
    // SAFETY: guaranteed by the caller.
    unsafe { &*data.cast_const().cast::<Batch>() }.exchange();
}

/// The last host function of work that runs once.
///
/// # Safety
/// As [`exchange_once`].
unsafe extern "C" fn end(data: *mut c_void) {
    // SAFETY: guaranteed by the caller.
    let batch = unsafe { Arc::from_raw(data.cast_const().cast::<Batch>()) };
    let comm = batch.comm.clone();
    // Its memory is back before anyone learns that it is over.
    drop(batch);
    comm.end_batch();
}

/// The graphs that own a batch are gone.
///
/// # Safety
/// As [`exchange_once`].
unsafe extern "C" fn forget(data: *mut c_void) {
    // SAFETY: guaranteed by the caller.
    let batch = unsafe { Arc::from_raw(data.cast_const().cast::<Batch>()) };
    batch.comm.count_captured(false);
}
