import time, sys, torch, statistics, traceback
import lora, lora.fast as F, lora.reference as R
from lora.projection import Projection, Dropout
torch.manual_seed(0); dev="cuda"
def rel(a,b): return float((a.double()-b.double()).norm()/(b.double().norm()+1e-30))
def P(o,i,r=16,dt=torch.bfloat16,nf4=False,A=True,mag=False):
    W=torch.randn(o,i,device=dev)/i**.5
    w=R.nf4_quantize(W) if nf4 else W.to(dt)
    return Projection(w,None,*( (torch.randn(r,i,device=dev).div_(i**.5).requires_grad_(),torch.randn(o,r,device=dev).div_(r**.5).requires_grad_()) if A else (None,None)),2.0,(torch.rand(o,device=dev)+.5).requires_grad_() if mag else None)
def leaves(ps): return [t for p in ps for t in p if isinstance(t,torch.Tensor) and t.requires_grad]
def wide(p):
    W=R.nf4_dequantize(p.weight,torch.float64) if not isinstance(p.weight,torch.Tensor) else p.weight.double()
    return Projection(W,*[t.detach().double().requires_grad_() if isinstance(t,torch.Tensor) else t for t in p[1:4]],p.scaling,None if p.magnitude is None else p.magnitude.detach().double().requires_grad_())
def check(name,op,x,ps,**kw):
    try:
        out={}
        for tag,mod,xx,pp in (("fast",F,x,ps),("ref",R,x,ps),("true",R,x.detach().double().requires_grad_(),[wide(p) for p in ps])):
            y=getattr(mod,op)(xx,*pp,**kw); y=y if isinstance(y,tuple) else (y,)
            torch.manual_seed(1); dy=[torch.randn(t.shape,device=dev).to(x.dtype).to(t.dtype) for t in y]
            out[tag]=[*y,*torch.autograd.grad(y,[xx,*leaves(pp)],dy)]
        ef=max(rel(a,b) for a,b in zip(out["fast"],out["true"])); er=max(rel(a,b) for a,b in zip(out["ref"],out["true"]))
        print("OK " if ef<=2*er+1e-6 else "BAD",name,f"fast {ef:.2e} ref {er:.2e}")
    except Exception as e: print("EXC",name,repr(e)[:300]); traceback.print_exc(limit=3)
for dt in (torch.float32,torch.bfloat16,torch.float16):
    for drop in (None,Dropout(0.1,5)):
        for nf4 in (False,True):
            x=torch.randn(2,100,256,device=dev).to(dt).requires_grad_()
            tag=f"{str(dt)[6:]} drop={drop is not None} nf4={nf4}"
            check("linear "+tag,"lora_linear",x,[P(320,256,dt=dt,nf4=nf4)],dropout=drop)
            check("linear dora "+tag,"lora_linear",x,[P(320,256,dt=dt,nf4=nf4,mag=True)],dropout=drop)
            check("qkv "+tag,"lora_qkv",x,[P(256,256,dt=dt,nf4=nf4),P(64,256,dt=dt,nf4=nf4),P(64,256,dt=dt,nf4=nf4,A=False)],dropout=drop)
            for act in ("silu","gelu","gelu_tanh"): check(f"mlp {act} "+tag,"lora_mlp",x,[P(512,256,dt=dt,nf4=nf4),P(512,256,dt=dt,nf4=nf4),P(256,512,dt=dt,nf4=nf4)],activation=act,dropout=drop)
    w=torch.randn(256,device=dev).to(dt)
    for kw in ({},{"offset":1.0,"round_before_weight":False}):
        y=F.rms_norm(x,w,**kw); t=R.rms_norm(x.double(),w.double(),**kw); r=R.rms_norm(x,w,**kw); print("norm",dt,rel(y,t),rel(r,t))
    lab=torch.randint(0,1000,(2,100),device=dev); lab[0,:50]=-100
    check_h=P(1000,256,dt=dt,A=False)
    for kw in ({},{"softcap":5.0,"label_smoothing":0.1},{"reduction":"none"}):
        h=x.detach().clone().requires_grad_(); a=F.linear_cross_entropy(h,check_h,lab,**kw); (ga,)=torch.autograd.grad(a.sum(),h)
        h2=x.detach().double().requires_grad_(); b=R.linear_cross_entropy(h2,wide(check_h),lab,**kw); (gb,)=torch.autograd.grad(b.sum(),h2)
        h3=x.detach().clone().requires_grad_(); c=R.linear_cross_entropy(h3,check_h,lab,**kw); (gc,)=torch.autograd.grad(c.sum(),h3)
        print("loss",dt,kw,rel(a,b),rel(c,b),"grad",rel(ga,gb),rel(gc,gb))
assert torch.equal(F.dropout_mask((1000,77),0.3,9,device=dev).cpu(),R.dropout_mask((1000,77),0.3,9))
q=R.nf4_quantize(torch.randn(4096,1000,device=dev)); assert all(torch.equal(F.nf4_dequantize(q,d),R.nf4_dequantize(q,d)) for d in (torch.float32,torch.bfloat16,torch.float16)); print("bits equal")
# whole model, modes
from transformers import LlamaConfig, LlamaForCausalLM
cfg=LlamaConfig(hidden_size=1024,intermediate_size=2816,num_hidden_layers=8,num_attention_heads=16,num_key_value_heads=4,vocab_size=32000)
torch.manual_seed(0); m=LlamaForCausalLM(cfg).to(torch.bfloat16).cuda(); lora.inject(m,lora.LoRAConfig(r=16,lora_alpha=32,lora_dropout=0.05)); ids=torch.randint(0,32000,(4,1024),device=dev)
res={}
for b,mode in (("reference","none"),("fast","none"),("fast","recompute"),("fast","selective"),("fast","offload"),("reference","offload")):
    with lora.use_backend(b):
        lora.for_training(m,checkpointing=mode)
        def step():
            torch.manual_seed(3); m.zero_grad(); l=m(ids,labels=ids).loss; l.backward(); return l
        try:
            step(); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); base=torch.cuda.memory_allocated(); ts=[]
            for _ in range(5):
                t=time.perf_counter(); l=step(); torch.cuda.synchronize(); ts.append(time.perf_counter()-t)
            g=m.model.layers[3].mlp.up_proj.lora_A["default"].grad.clone()
            res[b,mode]=(l.item(),g); print(b,mode,f"loss {l.item():.6f} step {statistics.median(ts)*1e3:.1f} ms peak+ {(torch.cuda.max_memory_allocated()-base)/2**20:.0f} MiB", "grad rel to ref", rel(g,res["reference","none"][1]), "equal to fast none", torch.equal(g,res.get(("fast","none"),(0,g))[1]))
        except Exception as e: print("EXC",b,mode,repr(e)[:400]); traceback.print_exc(limit=4)
